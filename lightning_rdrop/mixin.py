"""RDropMixin: R-Drop for a LightningModule."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_rdrop import own_losses, unlabeled, views
from lightning_rdrop._compat import passes_synchronize
from lightning_rdrop._fused import compiled_loss
from lightning_rdrop._lightning import extend_hook, on_all_ranks, rank_zero_info
from lightning_rdrop.arguments import non_negative, one_of, whole
from lightning_rdrop.checkpoint import WEIGHTS, Checkpointed, loss_arguments, own_weights
from lightning_rdrop.data_views import first_view
from lightning_rdrop.distance import Categorical, Distance, Together
from lightning_rdrop.draw import draw
from lightning_rdrop.guard import Guard, Redraw, Switches
from lightning_rdrop.inheritance import notice_replaced_step, require_first, require_init
from lightning_rdrop.late_duplication import LateDuplication
from lightning_rdrop.nesting import map_tensors
from lightning_rdrop.regularizers import Regularizer, distinct, logged_names
from lightning_rdrop.terms import Terms


class RDropMixin(Checkpointed):
    r"""Train a LightningModule with R-Drop: provides ``training_step`` and leaves everything else to your class.

    .. math:: \text{loss} = \text{ce} + \alpha\,\text{kl}

    over K predictions of each example under K dropout masks; see :class:`~lightning_rdrop.RDropLoss` for the two
    terms. Make it the first base class, pass ``**kwargs`` on, and return logits from ``forward`` (or an object with
    ``.logits``). It logs ``train/loss``, ``train/ce``, ``train/kl`` and ``train/alpha``; validation and prediction
    take a single pass.

    A batch ``{"labeled": ..., "unlabeled": ...}``, as from a ``CombinedLoader``, is semi-supervised:

    .. math:: \text{kl} = w_\text{labeled}\,\text{kl}_\text{labeled} + w\,\text{kl}_\text{unlabeled}

    each a mean over its own rows, logged as ``train/kl_labeled`` and ``train/kl_unlabeled`` in addition to
    ``train/kl``. The two parts take separate passes; batch size, prediction and ce are those of the labeled part. See
    :meth:`rdrop_unpack_unlabeled` for what the unlabeled part may contain.

    Args:
        rdrop_alpha: weight of the consistency term, >= 0; a plain attribute that callbacks set. If a loaded checkpoint
            was trained with another alpha, another number of views or other weights of the labeled and unlabeled part,
            and these are the defaults here, a warning says so.
        rdrop_views: K, the number of predictions per example; 1 is ordinary training. All use the same inputs,
            unless :meth:`rdrop_unpack` returns :class:`~lightning_rdrop.Views`, such as two augmentations.
        rdrop_distance: D of the general form; ``None`` is :class:`~lightning_rdrop.Categorical`. A dict of distances
            becomes :class:`~lightning_rdrop.Together`, for predictions and targets that are mappings with these keys.
            Saved in checkpoints: if neither passed nor assigned, it is rebuilt on load, or a warning says why it cannot
            be.
        rdrop_passes: ``"joint"`` is one forward pass over K * B rows; ``"separate"`` is K passes over B rows, for
            models whose randomness is shared by the whole batch (LayerDrop) and batches that cannot be duplicated.
        rdrop_duplicate_at: the submodule before which the batch is duplicated, so that everything before it runs once:
            its dotted name or the end of it, several names, a glob, or ``"auto"`` for the latest point before which
            nothing is random. ``None`` duplicates the inputs. See :mod:`lightning_rdrop.late_duplication.find_split`.
        rdrop_unlabeled_weight: w, >= 0, the weight of everything that unlabeled examples add: kl, regularizers that
            need no target, and the model's own losses; a plain attribute. If 0, unlabeled examples are skipped, and
            training is bit-identical to supervised training.
        rdrop_labeled_weight: :math:`w_\text{labeled}`, >= 0; only used with unlabeled examples. If 0, labeled examples
            take a single pass with plain cross-entropy, as in Su's experiments.
        rdrop_regularizers: further loss terms, such as :class:`~lightning_rdrop.VAT`, each logged under its name; see
            :class:`~lightning_rdrop.Regularizer`. ``None`` is none, or those of a loaded checkpoint; an empty list is
            none. Saved in checkpoints like the distance.
        rdrop_compile_loss: compile the loss, which makes it faster; the first step takes some ten seconds longer. See
            :func:`~lightning_rdrop.rdrop_cross_entropy`.
        rdrop_guard: what to do if training would be silently wrong, for example if the views cannot differ because
            dropout is off: ``"error"``, ``"warn"`` or ``"off"``. Checked on the first batch, and again when a module
            changes its mode, a dropout probability changes from or to 0, or a part is frozen or unfrozen; NaN is
            reported whenever the Trainer logs, and at the end of each epoch.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an unknown ``rdrop_`` argument, or the mixin comes after LightningModule in the bases.

    Source: Liang et al. 2021, arXiv 2106.14448; Su Jianlin, spaces.ac.cn/archives/8496.

    Example:
        >>> import pytorch_lightning as pl
        >>> class Classifier(RDropMixin, pl.LightningModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        ...     def forward(self, x):
        ...         return self.network(x)
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters())
        >>> module = Classifier(rdrop_alpha=4.0)
        >>> terms = module.rdrop_step((torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])))
        >>> terms.prediction.shape, bool(terms.kl > 0), bool(terms.loss == terms.ce + 4.0 * terms.kl)
        (torch.Size([5, 3]), True, True)
    """

    def __init__(
        self,
        *args: Any,
        rdrop_alpha: float = 4.0,
        rdrop_views: int = 2,
        rdrop_distance: Distance | dict[str, Distance] | None = None,
        rdrop_passes: Literal["joint", "separate"] = "joint",
        rdrop_duplicate_at: str | Sequence[str] | None = None,
        rdrop_unlabeled_weight: float = 1.0,
        rdrop_labeled_weight: float = 1.0,
        rdrop_regularizers: Sequence[Regularizer] | None = None,
        rdrop_compile_loss: bool = False,
        rdrop_guard: Literal["error", "warn", "off"] = "error",
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs)
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            if (hint := _without_prefix(kwargs, str(error))) is None:
                raise
            raise TypeError(f"{type(self).__name__}: {hint}") from error
        self.rdrop_alpha = rdrop_alpha
        self.rdrop_views = rdrop_views
        if isinstance(rdrop_distance, Mapping):
            rdrop_distance = Together(rdrop_distance)
        if not isinstance(rdrop_distance, (Distance, type(None))):
            raise TypeError(
                f"rdrop_distance must be a Distance, a dict of such, or None, got {rdrop_distance!r}. For a weighted "
                "cross-entropy use Categorical(weight=...); for another loss subclass lightning_rdrop.Distance, which "
                "defines to_target and between."
            )
        self.rdrop_distance = Categorical() if rdrop_distance is None else rdrop_distance
        self.rdrop_passes = rdrop_passes
        self.rdrop_duplicate_at = rdrop_duplicate_at
        self.rdrop_unlabeled_weight = rdrop_unlabeled_weight
        self.rdrop_labeled_weight = rdrop_labeled_weight
        self.rdrop_regularizers = nn.ModuleList(distinct(rdrop_regularizers or (), logged_names(self.rdrop_distance)))
        self.rdrop_compile_loss = rdrop_compile_loss
        self.rdrop_guard = rdrop_guard
        self._rdrop_check_attributes()
        self.rdrop_denominators: dict[str, Tensor] = {}
        """Rows per view that each term of the last logged step averaged over, by name; empty if it has no such mean."""
        self.rdrop_kl: Tensor | None = None
        """kl of the last logged step, read by callbacks; None before the first one."""
        self._rdrop_own = own_weights(self)
        passed, defaults = locals(), _arguments()
        self._rdrop_defaults = {
            name: used for name, used in loss_arguments(self).items() if passed[name] == defaults[name]
        }
        self._rdrop_guard = Guard()
        self._rdrop_switches: Switches | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_first(cls, RDropMixin)
        notice_replaced_step(cls, RDropMixin)
        extend_hook(cls, "on_fit_start", RDropMixin._rdrop_begin)
        extend_hook(cls, "on_train_batch_end", RDropMixin._rdrop_batch_ends)
        extend_hook(cls, "on_train_epoch_end", RDropMixin._rdrop_epoch_ends)

    @property
    def rdrop_duplicate_at(self) -> str | Sequence[str] | None:
        """The submodule before which the batch is duplicated; None duplicates the inputs. Can be set between steps."""
        return None if self._rdrop_late is None else self._rdrop_late.at

    @rdrop_duplicate_at.setter
    def rdrop_duplicate_at(self, at: str | Sequence[str] | None) -> None:
        if at is not None and self.rdrop_passes == "separate":
            raise ValueError(
                f"rdrop_duplicate_at={at!r} needs one pass for all views, but rdrop_passes='separate' makes one for "
                "each. Pass only one of them."
            )
        self._rdrop_late = None if at is None else LateDuplication(at)

    def _rdrop_check_attributes(self) -> None:
        """Check the plain attributes, which may be set at any time."""
        for name in WEIGHTS:
            setattr(self, name, non_negative(name, getattr(self, name)))
        self.rdrop_views = whole("rdrop_views", self.rdrop_views)
        one_of("rdrop_passes", self.rdrop_passes, ("joint", "separate"))
        one_of("rdrop_guard", self.rdrop_guard, ("error", "warn", "off"))
        self.rdrop_duplicate_at = self.rdrop_duplicate_at  # not with separate passes; its splits are searched again

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Run one R-Drop step and log its terms."""
        if not self.automatic_optimization:
            raise TypeError(
                "automatic_optimization is False, but the mixin's training_step does not step the optimizers, so the "
                "weights would never change. Write your own training_step: terms = self.rdrop_step(batch), "
                "self.rdrop_log(terms), self.manual_backward(terms.loss), and step the optimizers."
            )
        terms = self.rdrop_step(batch)
        self.rdrop_log(terms)
        outputs: dict[str, Any] = _outputs(terms)
        return outputs

    def rdrop_step(self, batch: Any) -> Terms:
        """Run the whole computation without logging, for manual optimization or your own ``training_step``.

        The terms carry gradients: minimize ``loss``, or a combination such as ``own_loss + alpha * terms.kl``. To
        assemble a step differently, call :meth:`rdrop_draw`, :meth:`rdrop_loss` and :meth:`rdrop_log`, which include
        the guard and the regularizers.
        """
        labeled, others = unlabeled.parts(batch)
        terms = self._rdrop_labeled(labeled) if others is None else self._rdrop_semi_supervised(labeled, others)
        self.rdrop_note(terms.kl, terms.ce)
        return terms

    def rdrop_draw(self, inputs: Any, target: Any = None, *, part: str = "labeled", count: int | None = None) -> Any:
        """Draw K predictions (K, N, ...), each under its own dropout masks, and let the guard check them.

        Args:
            inputs: inputs of B examples, or :class:`~lightning_rdrop.Views` of them.
            target: their target, checked by the guard; None if there is none.
            part: the part of the batch; the guard tracks each part separately.
            count: K, if not ``rdrop_views``.

        Returns:
            The predictions, as :class:`~lightning_rdrop.WithLosses` if :meth:`rdrop_predict_with_losses` returns that.
        """
        examples = self._rdrop_examples(inputs, target)
        return self._rdrop_guarded(inputs, target, examples, count or self.rdrop_views, part)

    def rdrop_loss(self, predictions: Any, target: Any, inputs: Any = None) -> Terms:
        """Compute the terms of K predictions.

        Args:
            predictions: shape (K, N, ...), with or without losses, from :meth:`rdrop_draw`.
            target: shape (N, ...).
            inputs: inputs of the B examples, for the regularizers; if None, these are skipped.
        """
        examples = None if inputs is None else self._rdrop_examples(inputs, target)
        terms = self._rdrop_terms(predictions, target, inputs, examples)
        self.rdrop_note(terms.kl, terms.ce)
        return terms

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # self.log inside a compiled training_step crashes in Lightning 2.6
    def rdrop_log(self, terms: Terms) -> None:
        """Log the terms of a step, detached, with the number of examples (not of rows in all views) as batch size.

        Step values are local to a rank and need no communication. Epoch values, ``train/ce_epoch`` and
        ``train/kl_epoch``, are means over the counted rows of all batches on all ranks. With several predictions this
        holds for each part, and their sums weight a batch by its examples. With unlabeled examples kl is the sum of two
        means over different rows, and weights a batch by its labeled rows.
        """
        self.rdrop_denominators, self.rdrop_kl = terms.denominators(), terms.kl.detach()
        self.log("train/loss", terms.loss, batch_size=terms.examples)
        for name, value in ({"alpha": self.rdrop_alpha} | terms.extra).items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=terms.examples)
        self._rdrop_log_means(terms, self.rdrop_distance, "train/", terms.examples)

    def _rdrop_log_means(self, terms: Terms, distance: Distance, prefix: str, examples: int | None) -> None:
        """Log ce and kl, per step and per epoch, for the whole and for each part."""
        ce_rows: Any = examples if terms.rows is None else terms.rows  # stays a tensor: no device synchronization
        kl_rows: Any = ce_rows if terms.kl_rows is None else terms.kl_rows
        both = ((terms.ce, ce_rows), (terms.kl, kl_rows))
        for name, (value, rows) in zip(distance.term_names, both, strict=True):
            self.log(f"{prefix}{name}", value, prog_bar=True, batch_size=examples)
            self.log(f"{prefix}{name}_epoch", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=rows)
        for name, part in terms.parts.items():
            self._rdrop_log_means(part, distance.part(name), f"{prefix}{name}_", examples)

    def _rdrop_begin(self) -> None:
        """Forget at the start of a fit what an earlier one found out, which may no longer hold."""
        require_init(self)
        self._rdrop_check_attributes()
        self._rdrop_own = own_weights(self)  # before a callback sets them
        self._rdrop_guard.begin()
        self._rdrop_switches = None
        with_losses = type(self).rdrop_predict_with_losses is not RDropMixin.rdrop_predict_with_losses
        self._rdrop_unchecked_output = self.rdrop_guard != "off" and not with_losses
        steps = ("training_step", "rdrop_step", "rdrop_loss", "rdrop_predict_with_losses")
        own = any(getattr(type(self), step) is not getattr(RDropMixin, step) for step in steps)
        if not own and not self.rdrop_regularizers:  # where the module's own losses may be used
            self._rdrop_guard.look_for_criterion(self, self.rdrop_distance)

    def _rdrop_batch_ends(self, *_: Any, **__: Any) -> None:
        if self.rdrop_views > 1:
            self._rdrop_guard.batch_ends(self)

    def _rdrop_epoch_ends(self) -> None:
        self._rdrop_switches = None  # a module may have been replaced
        self._rdrop_guard.epoch_ends(self)

    def _rdrop_labeled(self, batch: Any, weight: float = 1.0) -> Terms:
        """ce + alpha * weight * kl and the regularizers; with weight 0 there is only one view."""
        inputs, target = self.rdrop_unpack(batch)
        examples = self._rdrop_examples(inputs, target)
        predictions = self._rdrop_guarded(inputs, target, examples, self.rdrop_views if weight else 1, "labeled")
        return self._rdrop_terms(predictions, target, inputs, examples, weight)

    def _rdrop_terms(
        self, predictions: Any, target: Any, inputs: Any, examples: int | None, weight: float = 1.0
    ) -> Terms:
        alpha = weight * self._rdrop_checked_alpha()
        predictions, losses = own_losses.split_losses(predictions)
        with compiled_loss(self.rdrop_compile_loss):
            terms = self.rdrop_distance.terms(predictions, target, alpha, self.rdrop_head())
        terms.examples = examples
        self._rdrop_extend(terms, inputs, target, () if inputs is None else self.rdrop_regularizers, losses)
        return terms

    def _rdrop_semi_supervised(self, labeled: Any, others: Any) -> Terms:
        if self.rdrop_head() is not None:
            raise ValueError(
                "A fused head computes kl and cross-entropy together, but unlabeled examples have no target for the "
                "latter. Train without rdrop_head (fused_head=False), or without the unlabeled part."
            )
        weight = non_negative("rdrop_unlabeled_weight", self.rdrop_unlabeled_weight)
        labeled_weight = non_negative("rdrop_labeled_weight", self.rdrop_labeled_weight)
        terms = self._rdrop_labeled(labeled, labeled_weight)
        return unlabeled.join(
            terms,
            self._rdrop_unlabeled(others, terms) if weight else None,
            labeled_weight=labeled_weight,
            weight=weight,
            consistency=self.rdrop_distance.term_names[1],
        )

    def _rdrop_unlabeled(self, batch: Any, labeled: Terms) -> Terms | None:
        """alpha * kl of unlabeled examples and the regularizers that need no target; None if there is neither."""
        regularizers = [one for one in self.rdrop_regularizers if not one.uses_target]
        if self.rdrop_views == 1 and not regularizers:
            return None
        inputs, target = self.rdrop_unpack_unlabeled(batch)
        zero = torch.zeros_like(labeled.ce)
        if unlabeled.is_empty(inputs):
            self._rdrop_skip_part("unlabeled")
            return Terms(loss=zero, ce=zero, kl=zero, extra={str(one.name): zero for one in regularizers})
        target = unlabeled.counted(inputs, target, labeled, self.rdrop_distance)
        terms, losses = Terms(loss=zero, ce=zero, kl=zero), dict[str, Tensor]()
        if self.rdrop_views > 1:
            predictions, losses = own_losses.split_losses(self.rdrop_draw(inputs, target, part="unlabeled"))
            terms = self.rdrop_distance.consistency(predictions, self._rdrop_checked_alpha(), target)
        self._rdrop_extend(terms, inputs, target, regularizers, losses)
        return terms

    def _rdrop_extend(
        self, terms: Terms, inputs: Any, target: Any, regularizers: Iterable[Any], losses: dict[str, Tensor]
    ) -> None:
        """Add the weighted regularizers and the model's own losses to the loss."""
        for regularizer in regularizers:
            term = self._rdrop_term(regularizer, first_view(inputs), target)
            terms.loss = terms.loss + regularizer.weight * term
            terms.extra[regularizer.name] = term.detach()
        if losses:
            own_losses.add_losses(terms, losses, logged_names(self.rdrop_distance))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # takes gradients inside the step
    def _rdrop_term(self, regularizer: Regularizer, inputs: Any, target: Any) -> Tensor:
        term: Tensor = regularizer(self, inputs, target).mean
        return term

    def _rdrop_guarded(self, inputs: Any, target: Any, examples: int, count: int, part: str) -> Any:
        """Draw K predictions (K, N, ...), or hidden states for a head, and let the guard check them."""
        predict = self.rdrop_predict_with_losses
        self._rdrop_check_inputs(predict, inputs, examples, part, rows=count > 1 and self.rdrop_passes == "joint")
        late = self._rdrop_late if count > 1 and self._rdrop_splits(predict, inputs, count, part) else None
        redraw = partial(draw, self, predict, inputs, count, examples, passes=self.rdrop_passes, late=late)
        predictions = redraw()
        self._rdrop_watch(predictions, redraw, inputs, target, part)
        return predictions

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads values, and state that changes between steps
    def _rdrop_watch(self, drawn: Any, redraw: Redraw, inputs: Any, target: Any, part: str) -> None:
        def again() -> Any:
            return own_losses.split_losses(redraw())[0]

        predictions, _ = own_losses.split_losses(drawn)
        must_differ = self._rdrop_must_differ(views.count(predictions))
        switches = self._rdrop_own_switches()
        learned = self.rdrop_guard != "off" and part == "labeled" and target is not None
        first = self.rdrop_first_view(predictions) if learned else None
        counted = _counted(self.rdrop_distance, first, target) if learned else None
        self._rdrop_guard.watch(
            self, predictions, again, inputs, target, part, switches, must_differ=must_differ, counted=counted
        )
        if learned:
            self._rdrop_guard.note_target(self, self.rdrop_distance.has_invalid(first, target))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # communicates with other ranks
    def _rdrop_skip_part(self, part: str) -> None:
        must_differ = self._rdrop_must_differ(self.rdrop_views)
        self._rdrop_guard.skip_part(self, part, self._rdrop_own_switches(), must_differ=must_differ)

    def _rdrop_must_differ(self, count: int) -> bool:
        """Whether equal views are an error; if alpha is 0 on purpose, they only waste time."""
        return count > 1 and bool(self.rdrop_alpha or self._rdrop_own["rdrop_alpha"])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # keeps tensors of many steps
    def rdrop_note(self, kl: Tensor, ce: Tensor | None = None) -> None:
        """Pass the distance between the views to the guard, as ``rdrop_step`` and ``rdrop_loss`` do in each step.

        Args:
            kl: kl, or another distance that is 0 if the views are equal.
            ce: the task loss, compared to which kl should not be negligible; None if it may be.
        """
        self._rdrop_guard.note(kl, ce)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads values
    def _rdrop_check_inputs(self, predict: Any, inputs: Any, examples: int, part: str, *, rows: bool) -> None:
        self._rdrop_guard.check_inputs(self, inputs, part=part)
        if rows:
            self._rdrop_guard.check_rows(self, predict, inputs, examples, part=part)
            self._rdrop_guard.single_example(self, predict, inputs, examples, self._rdrop_own_switches(), part=part)

    def _rdrop_splits(self, predict: Any, inputs: Any, count: int, part: str) -> bool:
        """Whether the batch is duplicated inside the network."""
        if self._rdrop_late is None:
            return False

        def decide(decision: bool) -> bool:
            # a rank without unlabeled examples does not search for a split
            alone = part != "labeled" and not passes_synchronize(self)
            return decision if alone else on_all_ranks(self, decision)

        split, new = self._rdrop_late.split(self, predict, inputs, count, self._rdrop_own_switches().random(), decide)
        if split is not None and new:
            rank_zero_info(f"rdrop_duplicate_at={self.rdrop_duplicate_at!r}: {split}")
            if split.shared and self.rdrop_guard != "off":
                warnings.warn(
                    f"rdrop_duplicate_at={self.rdrop_duplicate_at!r}: {split.shared} runs before it and is random, so "
                    "all views share its dropout mask. Duplicate before it, or put it into eval mode.",
                    stacklevel=3,
                )
        return split is not None

    def _rdrop_examples(self, inputs: Any, target: Any) -> int:
        """B; with separate passes, whose inputs may be of any type, that of the target, or 0 without one."""
        if self.rdrop_passes == "joint":
            return views.batch_size(inputs, target)
        named = isinstance(self.rdrop_distance, Together) and isinstance(target, Mapping)
        parts = target.values() if named else () if target is None else (target,)
        return min(map(views.batch_size, parts), default=0)  # parts may have different rows, such as nodes and graphs

    def _rdrop_own_switches(self) -> Switches:
        self._rdrop_switches = self._rdrop_switches or Switches(self)
        return self._rdrop_switches

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reading it inside the graph would recompile for every alpha
    def _rdrop_checked_alpha(self) -> float:
        return non_negative("rdrop_alpha", self.rdrop_alpha)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be three graphs with only a detach
def _outputs(terms: Terms) -> dict[str, Any]:
    """What ``training_step`` returns to callbacks; only the loss keeps its graph."""
    others = {"ce": terms.ce, "kl": terms.kl, "prediction": terms.prediction}
    return {"loss": terms.loss} | {name: map_tensors(value, Tensor.detach) for name, value in others.items()}


def _counted(distance: Distance, prediction: Any, target: Any) -> Any:
    """Mask of the rows that count, which broadcasts over the classes; by name for several predictions."""
    if isinstance(distance, Together):
        distance.check_names(prediction, target)
        return {name: _counted(distance.part(name), prediction[name], target[name]) for name in distance.weights}
    counted = distance.counted(prediction, target) if isinstance(target, Tensor) else None
    if counted is not None and isinstance(distance, Categorical):
        return counted.unsqueeze(distance.class_dim)
    return counted


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    known = _arguments()
    for name in kwargs:
        if name.startswith("rdrop"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The arguments are {', '.join(known)}."
            raise TypeError(f"RDropMixin has no argument {name}. {hint}")


def _without_prefix(kwargs: dict[str, Any], refusal: str) -> str | None:
    """What to say of an argument that the other bases refuse and that is one of ours without its prefix, or None."""
    known = {argument.removeprefix("rdrop_"): argument for argument in _arguments()}
    for name in kwargs:
        near = difflib.get_close_matches(re.sub("^r_?drop_?", "", name.lower()), known, n=1, cutoff=0.75)
        if near and f"unexpected keyword argument '{name}'" in refusal:
            return f"unexpected argument {name}. Did you mean {known[near[0]]}?"
    return None


def _arguments() -> dict[str, Any]:
    """The defaults of the arguments."""
    parameters = inspect.signature(RDropMixin.__init__).parameters
    return {name: one.default for name, one in parameters.items() if name.startswith("rdrop_")}
