r"""Fine-tune a detector on COCO or VOC from a pretrained encoder, and evaluate it.

On a node of eight GPUs:
    python -m detection.train_net --num-gpus 8 --config-file detection/configs/pascal_voc_R_50_C4_24k.yaml \
        MODEL.WEIGHTS runs/mixmask/detectron2.pth OUTPUT_DIR runs/voc

The configs use 16 images per step; with fewer GPUs reduce the SOLVER's values in proportion, such as
SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.005. MODEL.WEIGHTS comes from detection.convert_to_detectron2; an
empty one ("") starts from random weights. For the names of sets see detection/datasets.py. On a CPU plain
BatchNorm replaces SyncBN. --resume continues a run; --eval-only evaluates MODEL.WEIGHTS. OUTPUT_DIR receives
Detectron2's checkpoints and logs, and result.json, or evaluation.json with --eval-only.
"""

import sys
from types import ModuleType

from training import cli


def main(argv: list[str]) -> None:
    """Train and evaluate a detector.

    Raises:
        ImportError: if Detectron2 is missing.
        FileNotFoundError, ValueError, CheckpointError: from :func:`detection.trainer.check_run`, before any
            process is started.
    """
    trainer = import_trainer()
    args = trainer.parse(argv, __doc__)
    trainer.check_run(args)
    trainer.launch(
        trainer.train_and_evaluate,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def import_trainer() -> ModuleType:
    """Import `detection.trainer`. Raises ImportError with the command to run if Detectron2 is missing."""
    try:
        from detection import trainer
    except ImportError as error:
        raise ImportError(
            f"detection needs Detectron2, which cannot be imported ({error}); `make setup` installs a build "
            "for CPUs, and Detectron2's own instructions cover CUDA"
        ) from error
    return trainer


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
