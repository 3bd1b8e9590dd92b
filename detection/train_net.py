"""Fine-tune a detector on COCO or VOC from a pretrained encoder, and evaluate it.

A node of eight GPUs:
    python -m detection.train_net --num-gpus 8 --config-file detection/configs/pascal_voc_R_50_C4_24k.yaml \\
        MODEL.WEIGHTS runs/mixmask/detectron2.pth OUTPUT_DIR runs/voc

The configs are for 16 pictures a step; with fewer GPUs give the SOLVER's values in proportion, such as
SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.005. MODEL.WEIGHTS comes from detection.convert_to_detectron2; an
empty one ("") begins from random weights. Sets: see detection/datasets.py. On a CPU, BatchNorm over all GPUs
becomes plain BatchNorm. --resume continues, --eval-only evaluates MODEL.WEIGHTS. Left in OUTPUT_DIR:
Detectron2's checkpoints and logs, and result.json, or with --eval-only evaluation.json.
"""

import sys
from types import ModuleType

from training import cli


def main(argv: list[str]) -> None:
    """Train or evaluate; see the top of this file.

    Raises ImportError if Detectron2 is missing, and for mistakes what `detection.training.prepare` raises,
    before processes are started.
    """
    training = import_training()
    args = training.parse(argv, __doc__)
    training.prepare(args)
    training.launch(
        training.run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def import_training() -> ModuleType:
    """`detection.training`. Raises ImportError, saying what to install, if Detectron2 is missing."""
    try:
        from detection import training
    except ImportError as error:
        raise ImportError(
            f"detection needs Detectron2, which cannot be imported ({error}); `make setup` installs a build "
            "for CPUs, and its own page tells how to install it for your CUDA"
        ) from error
    return training


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
