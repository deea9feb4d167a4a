"""`PositiveCongruentTraining` and `regression_loss` add a loss term against regressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._trainer.lightning import step_outputs
from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import (
    callbacks_of_class,
    trainer_of,
    validating,
)
from lightning_nrl._trainer.reading.loaders import length_of
from lightning_nrl._trainer.reference_copy import (
    check_other_model,
    parse_teacher,
    reference_module,
)
from lightning_nrl._trainer.tracking.tags import NUMBER_TAG, parse_prefix, tagged
from lightning_nrl._trainer.trainer_state import forward_context
from lightning_nrl._utils.checks import check_per_sample
from lightning_nrl._utils.preserve import preserve_state, replaced
from lightning_nrl._utils.registry import import_function
from lightning_nrl.callbacks.data_callback import DataCallback
from lightning_nrl.data import Adapter
from lightning_nrl.data.adapters import bind_adapter
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks import Task
from lightning_nrl.updates import OldModel, Predictions
from lightning_nrl.updates.loss_terms import (
    ModelTeacher,
    PredictedTeacher,
    ReferenceTeacher,
    Term,
    parse_terms,
)
from lightning_nrl.updates.old_model import AnyReference


class PositiveCongruentTraining(DataCallback):
    """Adds a loss term that keeps the new model right where the replaced model is right.

    The idea and the default term come from Yan et al. 2021, Positive-Congruent Training: Towards
    Regression-Free Model Updates. The callback computes the term from the output of `self(x)` in
    `training_step`, and adds it to the loss that the step returns. A step that does not call the
    model exactly once on its batch must call `regression_loss`; otherwise an error is raised. Each
    term is logged as `regression/<name of the term>`. The replaced model does not become part of
    the module, its checkpoints or its optimizer.

    Args:
        reference: the replaced model: a module, the path of its checkpoint, or an `OldModel`. If
            the term is a `MarginHinge` with a finite `most`, the path of a CSV file with the
            model's predictions is enough.
        term: `focal_distillation`, `margin_hinge`, a `FocalDistillation`, a `MarginHinge`, a custom
            term (`lightning_nrl.updates.loss_terms.Term`), or a list of terms, whose sum is added.
        index: function of a batch that returns the data-set position of each sample, or the
            function's address. If given, outputs of the replaced model are cached by position, so
            samples must not be augmented. If `reference` is a CSV file, `index` is required. If
            None, the replaced model runs on every batch.
        prefix: prefix of logged tags.
        task: as in `RegressionFreeRepair`.
        adapter: as in `DataOptions`, but it must not run the module itself.
        output: as in `DataOptions`.

    Example::

        congruent = PositiveCongruentTraining("old.ckpt")
        repair = RegressionFreeRepair(reference="old.ckpt")
        Trainer(callbacks=[congruent, repair]).fit(new_model, datamodule=dm)
    """

    def __init__(
        self,
        reference: AnyReference,
        term: str | Term | Sequence[str | Term] = "focal_distillation",
        index: str | Callable[[Any], Any] | None = None,
        prefix: str = "regression",
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
        output: int | str | None = None,
    ) -> None:
        super().__init__(task, adapter, output)
        self.reference = parse_teacher(reference)
        self.terms = parse_terms(term)
        self.index = None if index is None else import_function("index", index)
        if isinstance(self.reference, Predictions) and self.index is None:
            raise ConfigurationError(
                "`reference`: predictions are found by data-set position; `index` is None.",
                "give `index=f`, where f(batch) returns data-set positions, "
                "or give the model as `reference`.",
            )
        self.prefix = parse_prefix(prefix, "regression")
        self._step = ExitStack()  # while it is open, the module's step is replaced
        self._outputs = step_outputs.OutputCapture()
        self._held = ExitStack()  # resources of the replaced model
        self._teacher: ReferenceTeacher | None = None
        self._called = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.teardown()
        if stage != "fit":
            return
        if len(callbacks_of_class(trainer, PositiveCongruentTraining)) > 1:
            raise ConfigurationError(
                "`callbacks`: there are several PositiveCongruentTraining.",
                "keep one, and give it all terms as `term=[...]`.",
            )
        check_other_model(self.reference, pl_module)
        self._outputs.attach(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self._teacher is None:
            self._check_first_batch(trainer, pl_module, batch)
        # The step is replaced only during a batch: a copy of a module with a replaced step would
        # call the original's.
        self._step.close()
        step = partial(self._step_with_terms, pl_module, batch, pl_module.training_step)
        self._step.enter_context(replaced(pl_module, training_step=step))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._step.close()

    # Lightning does not call `on_train_batch_end` for a skipped batch.
    on_train_epoch_end = on_train_batch_end

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._step.close()
        self._outputs.detach()
        self._held.close()
        self._teacher = None
        self._called = False

    on_train_end = on_exception = teardown

    def loss(self, pl_module: LightningModule, batch: object, output: object) -> Tensor:
        """Logs each term's mean over a batch; returns the sum of means (see `regression_loss`)."""
        args, kwargs, target = bind_adapter(self.adapter, pl_module)(batch)
        self._called = True
        call = step_outputs.ForwardPass(args, kwargs, self.task.logits(output))
        return self._loss(pl_module, call, target, batch)

    def _step_with_terms(
        self,
        pl_module: LightningModule,
        batch: object,
        step: Callable[..., object],
        *args: object,
        **kwargs: object,
    ) -> object:
        self._called = False
        # Read before the step, which may write into the batch.
        inputs, named_inputs, target = bind_adapter(self.adapter, pl_module)(batch)
        self._outputs.begin()
        try:
            result = step(*args, **kwargs)
        finally:
            part, calls = self._outputs.calls()
        if self._called or (result is None and pl_module.automatic_optimization):
            return result
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                "`training_step` uses manual optimisation, so the callback cannot add to its loss.",
                step_outputs.ONE_LINE,
            )
        call = step_outputs.find_forward_pass(
            part, calls, inputs, named_inputs, length_of(target), self.task
        )
        return step_outputs.add_to_loss(result, self._loss(pl_module, call, target, batch))

    def _loss(
        self,
        pl_module: LightningModule,
        call: step_outputs.ForwardPass,
        target: object,
        raw: object,
    ) -> Tensor:
        assert self._teacher is not None
        logits = call.logits
        with validating(pl_module.trainer):
            old = self._teacher(call.args, call.kwargs, target, raw, logits)
        means = {term.name: term(self.task, logits, target, old).mean() for term in self.terms}
        tags = tagged(NUMBER_TAG, means, name=self.prefix)
        # Lightning detaches the values that it logs.
        pl_module.log_dict(tags, on_step=False, on_epoch=True, batch_size=len(logits))
        return torch.stack(list(means.values())).sum()

    @torch.no_grad()
    def _check_first_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: object
    ) -> None:
        args, kwargs, target = bind_adapter(self.adapter, pl_module)(batch)
        old = self.reference
        teacher: ReferenceTeacher
        if isinstance(old, OldModel):
            model = reference_module(trainer, pl_module, old.model, self._held)
            teacher = ModelTeacher(model, self.task, old.adapter, old.classes, self.index)
        else:
            assert self.index is not None
            teacher = PredictedTeacher(old, self.task, self.index)
        probe = step_outputs.Probe(pl_module)
        with preserve_state(pl_module), forward_context(trainer, pl_module), validating(trainer):
            try:
                output = probe(*args, **kwargs)
            except Exception as error:
                raise ConfigurationError(
                    f"`adapter`: the model raised {type(error).__name__} on the first batch "
                    f"({error}).",
                    "give `adapter=f`, where f(batch) returns (args, kwargs, target) "
                    "for your batches.",
                ) from error
            logits = self.task.logits(output)
            self.task.check(logits, target)
            answers = teacher(args, kwargs, target, batch, logits)
            for term in self.terms:
                values = term(self.task, logits, target, answers)
                check_per_sample(f"`term`: {term.name}", values, len(logits))
        self._outputs.attach(pl_module, probe.parts or ())
        self._teacher = teacher


def regression_loss(module: LightningModule, batch: object, output: object) -> Tensor:
    """Returns the loss of `PositiveCongruentTraining`, for a `training_step` that adds it itself.

    This is needed if the step uses manual optimisation, calls the model several times, or mixes
    samples (mixup). The function returns 0 outside of training, and if the trainer has no
    `PositiveCongruentTraining`.

    Args:
        module: the module whose `training_step` runs.
        batch: the batch as the data loader returns it, or `(augmented inputs, labels)` if the step
            augments the inputs.
        output: output of the model for this batch, with gradients.

    Example::

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            return loss + regression_loss(self, batch, logits)
    """
    trainer = trainer_of(module)
    if trainer is not None and trainer.training:
        for callback in callbacks_of_class(trainer, PositiveCongruentTraining):
            return callback.loss(module, batch, output)
    return torch.zeros((), device=module.device)
