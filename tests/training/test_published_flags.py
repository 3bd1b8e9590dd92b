"""Published command lines, word by word; tests/test_presets.py checks docs/command-line.md."""

import pytest

from training.published_flags import from_published


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("", ""),
        ("DATA --lr 0.1 --grid_size 8", "DATA --lr 0.1 --grid-size 8"),
        ("--unmix_prob 0.5 --unmix-prob=0", "--unmix-global-prob 0.5 --unmix-global-prob=0"),
        ("--mask_type discrete", "--mask-type grid"),
        ("--mask-type=discrete", "--mask-type=grid"),
        ("--mask-type block discrete", "--mask-type block discrete"),
        ("-a resnet50 -b 256 -b64 -h", "-a resnet50 -b 256 -b64 -h"),
        ("--resume DATA", "--resume DATA"),
        ("--out my_runs/gpu_0 -- --x", "--out my_runs/gpu_0 -- --x"),
        ("--preset tiny-imagenet --lr -1", "--preset tiny-imagenet --lr -1"),
    ],
)
def test_renamed_and_unchanged_words(published: str, ours: str) -> None:
    assert from_published(published.split()) == ours.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--multiprocessing-distributed", "torchrun --nproc-per-node"),
        ("--multiprocessing_distributed", "torchrun --nproc-per-node"),
        ("--world-size=1", "leave out --world-size"),
        ("-j 32", "-j set the number of a node's loader processes"),
        ("-j32", "--num-threads"),
        ("-j=32", "--num-threads"),
        ("-p 10", "--log-every-s"),
        ("--gpu 0", "CUDA_VISIBLE_DEVICES"),
        ("--start_epoch 5", "--resume"),
        ("--resume runs/a/100.pth.tar DATA", "takes no path"),
        ("--resume=DATA", "takes no path"),
        ("--resume= DATA", "takes no path"),
    ],
)
def test_flags_without_an_equivalent_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_published(words.split())
