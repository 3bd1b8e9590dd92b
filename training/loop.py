"""The loop of every training: epochs of steps, counted, logged, and stopped where all processes agree."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from training.logs import NonFiniteLoss, RunLog, last_good_state
from training.run import Run
from training.stop import StopRequest


def train_epochs(
    run: Run,
    train_step: Callable[[Any], Mapping[str, Tensor | float]],
    log: RunLog,
    stop: StopRequest,
) -> Iterator[None]:
    """Train to the end of the schedule, or until a stop is asked for.

    Yields after each epoch, and after the step at which the processes agree to stop, when
    ``stop.requested`` is set. train_step: takes a batch, returns the step's metrics.
    Raises NonFiniteLoss for a loss, and for weights, that are not finite.
    """
    while run.epoch < run.num_epochs and not stop.requested:
        run.loader.set_epoch(run.epoch)
        for batch in run.loader:
            metrics = train_step(batch)
            wait_s = run.loader.take_waited_s()
            log.step(run.step, metrics, epoch=run.epoch, samples=run.global_batch, wait_s=wait_s)
            run.step += 1
            if stop.agreed(run.launch, ask=run.step % 10 == 0):
                break
        else:
            run.epoch += 1
            stop.agreed(run.launch, ask=True)
        log.flush()
        _refuse_non_finite_weights(run)
        yield


def _refuse_non_finite_weights(run: Run) -> None:
    """A last step may have spoilt them though its loss was finite."""
    trained = list[Tensor](p for p in run.model.parameters() if p.requires_grad)
    if not torch.stack(torch._foreach_norm(trained)).isfinite().all():
        raise NonFiniteLoss(f"the weights are not finite after step {run.step}; {last_good_state(run.out)}")


def due(epoch: int, every: int, last: int) -> bool:
    """Whether something done every few epochs is due after ``epoch`` of them; always after the last."""
    return epoch > 0 and (epoch % every == 0 or epoch == last)
