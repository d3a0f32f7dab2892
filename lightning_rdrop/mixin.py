"""RDropMixin: the one place where the loss meets Lightning."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_rdrop import own_losses, unlabeled, views
from lightning_rdrop._compat import forget_hyperparameters
from lightning_rdrop._fused import compiled_loss
from lightning_rdrop._lightning import extend_hook, on_all_ranks, rank_zero_info
from lightning_rdrop.arguments import non_negative, one_of, whole
from lightning_rdrop.data_views import first_view
from lightning_rdrop.description import describe, rebuild, same_description, spell
from lightning_rdrop.distance import Categorical, Distance, Together
from lightning_rdrop.draw import draw
from lightning_rdrop.guard import Guard, Redraw, Switches
from lightning_rdrop.guard.rows import passes_meet
from lightning_rdrop.hooks import Hooks
from lightning_rdrop.inheritance import notice_replaced_step, require_first
from lightning_rdrop.late_duplication import LateDuplication
from lightning_rdrop.nesting import map_tensors
from lightning_rdrop.regularizers import Regularizer, distinct
from lightning_rdrop.terms import Terms


class RDropMixin(Hooks):
    r"""Makes a LightningModule train with R-Drop: it supplies ``training_step``, the class keeps all the rest.

    .. math:: \text{loss} = \text{ce} + \alpha\,\text{kl}

    over K predictions of every example under K dropout masks; see :class:`~lightning_rdrop.RDropLoss` for the two
    terms. Inherit it first, pass ``**kwargs`` on, and return logits from ``forward`` (or an object with ``.logits``).
    It logs ``train/loss``, ``train/ce``, ``train/kl`` and ``train/alpha``; validation and prediction run once.

    A batch ``{"labeled": ..., "unlabeled": ...}``, what a ``CombinedLoader`` gives, is semi-supervised:

    .. math:: \text{kl} = w_\text{labeled}\,\text{kl}_\text{labeled} + w\,\text{kl}_\text{unlabeled}

    each a mean over its own rows, logged as ``train/kl_labeled`` and ``train/kl_unlabeled`` beside their sum. The two
    parts are two passes; batch size, prediction and ce are those of the labelled one. See
    :meth:`rdrop_unpack_unlabeled` for what the other may hold.

    Args:
        rdrop_alpha: the weight of the consistency, >= 0; a plain attribute, which callbacks set.
        rdrop_views: K, the predictions of an example; 1 is ordinary training. They are of the same inputs, or each of
            its own where :meth:`rdrop_unpack` returns :class:`~lightning_rdrop.Views`, such as two augmentations.
        rdrop_distance: D of the general form; ``None`` is :class:`~lightning_rdrop.Categorical`. Several by name are
            :class:`~lightning_rdrop.Together`, for predictions and targets that are mappings with these names. A
            checkpoint describes it: where none is given, it is rebuilt on load, or a warning says why it cannot be.
        rdrop_passes: ``"joint"`` is one forward of K * B rows; ``"separate"`` is K forwards of B, for a model whose
            randomness is shared by a whole batch (LayerDrop) and for batches that cannot be doubled.
        rdrop_duplicate_at: the submodule before which the batch is doubled, so that what lies before runs once: its
            dotted name or the end of it, several, a glob, or ``"auto"`` for the latest place before which nothing is
            random. ``None`` doubles at the entrance. See :mod:`lightning_rdrop.late_duplication.find_split`.
        rdrop_unlabeled_weight: w, >= 0, of all that unlabelled examples add: kl, and the regularizers that need no
            target; a plain attribute. While it is 0 they have no pass, and training is supervised to the bit.
        rdrop_labeled_weight: :math:`w_\text{labeled}`, >= 0, where there are unlabelled examples. With 0 the labelled
            ones have but one pass, and plain cross-entropy, as in Su's experiments.
        rdrop_regularizers: further terms of the loss, such as :class:`~lightning_rdrop.VAT`, each logged by its name;
            see :class:`~lightning_rdrop.Regularizer`. ``None`` is none, or those of a checkpoint that is loaded, and an
            empty list is none. Checkpoints describe them as they do the distance.
        rdrop_compile_loss: compile the arithmetic of the loss, which is then faster, some ten seconds after the first
            step begins; see :func:`~lightning_rdrop.rdrop_cross_entropy`.
        rdrop_guard: what happens where training would be silently wrong, such as views that cannot differ because
            dropout is off: ``"error"``, ``"warn"`` or ``"off"``. Checked on the first batch, and again when a mode
            changes, a p becomes 0 or is 0 no longer, or a part is unfrozen; NaN is looked for whenever the Trainer
            logs, and at the end of each epoch.

    Raises:
        ValueError: an argument out of its range.
        TypeError: an unknown ``rdrop_`` argument, or the mixin after LightningModule in the bases.

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

    rdrop_unsaved: ClassVar[tuple[str, ...]] = ("rdrop_distance", "rdrop_regularizers")
    """The arguments that are modules, and no hyper-parameters."""

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
        super().__init__(*args, **kwargs)
        self.rdrop_alpha = non_negative("rdrop_alpha", rdrop_alpha)
        self.rdrop_views = whole("rdrop_views", rdrop_views)
        if isinstance(rdrop_distance, Mapping):
            rdrop_distance = Together(rdrop_distance)
        if not isinstance(rdrop_distance, (Distance, type(None))):
            raise TypeError(
                f"rdrop_distance must be a Distance, several by name, or None, got {rdrop_distance!r}. For a weighted "
                "cross-entropy use Categorical(weight=...); for another loss write a Distance, see docs/distances.md."
            )
        self.rdrop_distance = Categorical() if rdrop_distance is None else rdrop_distance
        self.rdrop_passes = one_of("rdrop_passes", rdrop_passes, ("joint", "separate"))
        self.rdrop_duplicate_at = rdrop_duplicate_at
        self.rdrop_unlabeled_weight = non_negative("rdrop_unlabeled_weight", rdrop_unlabeled_weight)
        self.rdrop_labeled_weight = non_negative("rdrop_labeled_weight", rdrop_labeled_weight)
        self.rdrop_regularizers = nn.ModuleList(distinct(rdrop_regularizers or (), self._rdrop_logged()))
        self.rdrop_compile_loss = rdrop_compile_loss
        self.rdrop_guard = one_of("rdrop_guard", rdrop_guard, ("error", "warn", "off"))
        self.rdrop_rows: Tensor | None = None
        """The number of rows over which the last step was a mean, for callbacks; None where it was none."""
        self.rdrop_denominators: dict[str, Tensor] = {}
        """Those of the terms, by name; several predictions have several."""
        self.rdrop_kl: Tensor | None = None
        """The kl of the last step that was logged, for callbacks; None before the first."""
        given = {"rdrop_distance": rdrop_distance, "rdrop_regularizers": rdrop_regularizers}
        self._rdrop_given = [name for name, value in given.items() if value is not None]
        self._rdrop_own_alpha = self.rdrop_alpha
        self._rdrop_guard = Guard()
        self._rdrop_switches: Switches | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_first(cls, RDropMixin)
        notice_replaced_step(cls, RDropMixin)
        extend_hook(cls, "on_fit_start", RDropMixin._rdrop_begin)
        extend_hook(cls, "on_train_batch_end", RDropMixin._rdrop_batch_ends)
        extend_hook(cls, "on_train_epoch_end", RDropMixin._rdrop_epoch_ends)
        extend_hook(cls, "on_save_checkpoint", RDropMixin._rdrop_save)
        extend_hook(cls, "on_load_checkpoint", RDropMixin._rdrop_load)

    @property
    def rdrop_duplicate_at(self) -> str | Sequence[str] | None:
        """Where the batch is doubled; None is at the entrance. It may be set between two steps."""
        return None if self._rdrop_late is None else self._rdrop_late.at

    @rdrop_duplicate_at.setter
    def rdrop_duplicate_at(self, at: str | Sequence[str] | None) -> None:
        if at is not None and self.rdrop_passes == "separate":
            raise ValueError(
                f"rdrop_duplicate_at={at!r} doubles the batch of one pass, and rdrop_passes='separate' doubles none. "
                "Give one of them."
            )
        self._rdrop_late = None if at is None else LateDuplication(at, self.rdrop_views)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One R-Drop step, logged."""
        if not self.automatic_optimization:
            raise TypeError(
                "automatic_optimization is False, and the mixin's training_step makes no optimizer step, so the "
                "weights would never change. Write a training_step of your own: terms = self.rdrop_step(batch), "
                "self.rdrop_log(terms), self.manual_backward(terms.loss), and the steps of the optimizers."
            )
        terms = self.rdrop_step(batch)
        self.rdrop_log(terms)
        outputs: dict[str, Any] = _outputs(terms)
        return outputs

    def rdrop_step(self, batch: Any) -> Terms:
        """The whole computation without logging, for manual optimization or a training_step of one's own.

        The terms carry gradients: ``loss`` is what to minimize, and ``own_loss + alpha * terms.kl`` is right as well.
        A step that is put together otherwise has the same pieces, with guard and regularizers: :meth:`rdrop_draw`,
        :meth:`rdrop_loss` and :meth:`rdrop_log`.
        """
        labeled, others = unlabeled.parts(batch)
        terms = self._rdrop_labeled(labeled) if others is None else self._rdrop_semi_supervised(labeled, others)
        self.rdrop_note(terms.kl, terms.ce)
        return terms

    def rdrop_draw(self, inputs: Any, target: Any = None, *, part: str = "labeled", count: int | None = None) -> Any:
        """K predictions (K, N, ...) of some inputs, each under dropout masks of its own, watched by the guard.

        Args:
            inputs: those of B examples, or :class:`~lightning_rdrop.Views` of them.
            target: theirs, which the guard looks at on the first batch; None where there is none.
            part: which part of a batch this is; the guard knows each by itself.
            count: K, where it is not ``rdrop_views``.

        Returns:
            the predictions, in :class:`~lightning_rdrop.WithLosses` where :meth:`rdrop_predict_with_losses` gives such.
        """
        examples = self._rdrop_examples(inputs, target)
        return self._rdrop_guarded(inputs, target, examples, count or self.rdrop_views, part)

    def rdrop_loss(self, predictions: Any, target: Any, inputs: Any = None) -> Terms:
        """The terms of K predictions.

        Args:
            predictions: shape (K, N, ...), with or without losses, from :meth:`rdrop_draw`.
            target: shape (N, ...).
            inputs: those of the B examples, of which regularizers make their passes; without them there are none.
        """
        examples = None if inputs is None else self._rdrop_examples(inputs, target)
        terms = self._rdrop_terms(predictions, target, inputs, examples)
        self.rdrop_note(terms.kl, terms.ce)
        return terms

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # self.log inside a compiled training_step crashes in Lightning 2.6
    def rdrop_log(self, terms: Terms) -> None:
        """Log the terms of a step, detached, with the number of examples (never of views) as the batch size.

        The values of a step are those of one rank, which takes no collective. Those of an epoch, ``train/ce_epoch``
        and ``train/kl_epoch``, are means over the rows that counted in its batches on all ranks; with several
        predictions those of each part are, and their sums weigh batches by their examples. With unlabelled examples kl
        is the sum of two means, each over its own rows, and weighs batches by their labelled ones.
        """
        self.rdrop_rows, self.rdrop_denominators, self.rdrop_kl = terms.rows, terms.denominators(), terms.kl.detach()
        self.log("train/loss", terms.loss, batch_size=terms.examples)
        for name, value in ({"alpha": self.rdrop_alpha} | terms.extra).items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=terms.examples)
        self._rdrop_log_means(terms, self.rdrop_distance, "train/", terms.examples)

    def _rdrop_log_means(self, terms: Terms, distance: Distance, prefix: str, examples: int | None) -> None:
        """ce and kl, of the step and of the epoch, and those of the parts."""
        ce_rows: Any = examples if terms.rows is None else terms.rows  # a tensor, which is not waited for
        kl_rows: Any = ce_rows if terms.kl_rows is None else terms.kl_rows
        both = ((terms.ce, ce_rows), (terms.kl, kl_rows))
        for name, (value, rows) in zip(distance.term_names, both, strict=True):
            self.log(f"{prefix}{name}", value, prog_bar=True, batch_size=examples)
            self.log(f"{prefix}{name}_epoch", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=rows)
        for name, part in terms.parts.items():
            self._rdrop_log_means(part, distance.part(name), f"{prefix}{name}_", examples)

    def save_hyperparameters(
        self, *args: Any, ignore: Any = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """As Lightning's, without the modules among the arguments, with which a checkpoint would not load under
        ``weights_only=True``. Where the CLI gives them, as plain configuration, they are kept."""
        current = inspect.currentframe()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"Attribute '({'|'.join(self.rdrop_unsaved)})'")
            super().save_hyperparameters(
                *args, ignore=ignore, frame=frame or (current and current.f_back), logger=logger
            )
        forget_hyperparameters(self, self.rdrop_unsaved)

    def _rdrop_begin(self) -> None:
        """A fit begins: what was found out in an earlier one may not hold any more."""
        self._rdrop_own_alpha = self.rdrop_alpha  # which a callback has not set yet
        self._rdrop_guard.begin()
        self._rdrop_switches = None
        if self._rdrop_late is not None:
            self._rdrop_late.forget()

    def _rdrop_batch_ends(self, *_: Any) -> None:
        if self.rdrop_views > 1:
            self._rdrop_guard.batch_ends(self)

    def _rdrop_epoch_ends(self) -> None:
        self._rdrop_switches = None  # a module may have been replaced
        self._rdrop_guard.epoch_ends(self)

    def _rdrop_save(self, checkpoint: dict[str, Any]) -> None:
        """Describe the modules that are no hyper-parameters."""
        checkpoint["rdrop"] = self._rdrop_described()

    def _rdrop_load(self, checkpoint: dict[str, Any]) -> None:
        """Make again what was trained with and is not given here, and say what is another one or cannot be made."""
        if "rdrop" not in checkpoint:
            rank_zero_info(
                "The checkpoint does not say with which rdrop_distance and rdrop_regularizers it was trained: those of "
                f"{type(self).__name__} stay, {spell(self._rdrop_described()['rdrop_distance'])} and "
                f"{spell(self._rdrop_described()['rdrop_regularizers'])}."
            )
        for name, saved in checkpoint.get("rdrop", {}).items():
            if same_description(saved, self._rdrop_described()[name]):
                continue
            try:
                if name in self._rdrop_given:
                    raise ValueError(f"{spell(self._rdrop_described()[name])} was given here")
                if name == "rdrop_distance":
                    self._rdrop_take(rebuild(saved, Distance).to(self.device))
                else:
                    made = [rebuild(one, Regularizer).to(self.device) for one in saved]
                    self.rdrop_regularizers = nn.ModuleList(distinct(made, self._rdrop_logged()))
            except ValueError as error:
                warnings.warn(
                    f"The checkpoint was trained with {name}={spell(saved)}, which {type(self).__name__} has not now: "
                    f"{error}. Give it to load_from_checkpoint, or to the class, if the loss is to be the same.",
                    stacklevel=4,
                )
            else:
                rank_zero_info(f"Made again from the checkpoint: {name}={spell(saved)}.")

    def _rdrop_take(self, distance: Distance) -> None:
        """Measure by another distance from now on."""
        self.rdrop_distance = distance

    def _rdrop_described(self) -> dict[str, Any]:
        parts = {"rdrop_distance": self.rdrop_distance, "rdrop_regularizers": [*self.rdrop_regularizers]}
        return {name: describe(part) for name, part in parts.items()}

    def _rdrop_labeled(self, batch: Any, weight: float = 1.0) -> Terms:
        """ce + alpha weight kl, and the regularizers; with weight 0 the examples have but one view."""
        inputs, target = self.rdrop_unpack(batch)
        examples = self._rdrop_examples(inputs, target)
        predictions = self._rdrop_guarded(inputs, target, examples, self.rdrop_views if weight else 1, "labeled")
        return self._rdrop_terms(predictions, target, inputs, examples, weight)

    def _rdrop_terms(
        self, predictions: Any, target: Any, inputs: Any, examples: int | None, weight: float = 1.0
    ) -> Terms:
        alpha = weight * self._rdrop_checked_alpha()
        predictions, losses = own_losses.parted(predictions)
        with compiled_loss(self.rdrop_compile_loss):
            terms = self.rdrop_distance.terms(predictions, target, alpha, self.rdrop_head())
        terms.examples = examples
        self._rdrop_extend(terms, inputs, target, () if inputs is None else self.rdrop_regularizers, losses)
        return terms

    def _rdrop_semi_supervised(self, labeled: Any, others: Any) -> Terms:
        if self.rdrop_head() is not None:
            raise ValueError(
                "A fused head makes kl and cross-entropy together, and unlabelled examples have no target for the "
                "latter. Train without rdrop_head (fused_head=False), or without the unlabelled part."
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
        """alpha kl of unlabelled examples, and the regularizers that need no target; None where there is neither."""
        regularizers = [one for one in self.rdrop_regularizers if not one.uses_target]
        if self.rdrop_views == 1 and not regularizers:
            return None
        inputs, target = self.rdrop_unpack_unlabeled(batch)
        zero = torch.zeros_like(labeled.ce)
        if unlabeled.is_empty(inputs):
            self._rdrop_pass_by("unlabeled")
            return Terms(loss=zero, ce=zero, kl=zero, extra={str(one.name): zero for one in regularizers})
        target = unlabeled.counted(inputs, target, labeled, self.rdrop_distance)
        terms, losses = Terms(loss=zero, ce=zero, kl=zero), dict[str, Tensor]()
        if self.rdrop_views > 1:
            predictions, losses = own_losses.parted(self.rdrop_draw(inputs, target, part="unlabeled"))
            terms = self.rdrop_distance.consistency(predictions, self._rdrop_checked_alpha(), target)
        self._rdrop_extend(terms, inputs, target, regularizers, losses)
        return terms

    def _rdrop_extend(
        self, terms: Terms, inputs: Any, target: Any, regularizers: Iterable[Any], losses: dict[str, Tensor]
    ) -> None:
        """Add the weighted terms of regularizers, and the losses of the model's own, to the loss."""
        for regularizer in regularizers:
            term = self._rdrop_term(regularizer, first_view(inputs), target)
            terms.loss = terms.loss + regularizer.weight * term
            terms.extra[regularizer.name] = term.detach()
        if losses:
            own_losses.add_losses(terms, losses, self._rdrop_logged())

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it differentiates inside the step
    def _rdrop_term(self, regularizer: Regularizer, inputs: Any, target: Any) -> Tensor:
        term: Tensor = regularizer(self, inputs, target).mean
        return term

    def _rdrop_guarded(self, inputs: Any, target: Any, examples: int, count: int, part: str) -> Any:
        """K predictions (K, N, ...), or the hidden states of which a head makes them, under the eyes of the guard."""
        predict = self.rdrop_predict_with_losses
        if count > 1 and self.rdrop_passes == "joint":
            self._rdrop_part_rows(predict, inputs, examples, part)
        late = self._rdrop_late if count > 1 and self._rdrop_splits(predict, inputs, part) else None
        redraw = partial(draw, self, predict, inputs, count, examples, passes=self.rdrop_passes, late=late)
        predictions = redraw()
        self._rdrop_watch(predictions, redraw, inputs, target, part)
        return predictions

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks at values, and at what changes between steps
    def _rdrop_watch(self, drawn: Any, redraw: Redraw, inputs: Any, target: Any, part: str) -> None:
        def again() -> Any:
            return own_losses.parted(redraw())[0]

        predictions, _ = own_losses.parted(drawn)
        must_differ = self._rdrop_must_differ(views.count(predictions))
        switches = self._rdrop_own_switches()
        self._rdrop_guard.watch(self, predictions, again, inputs, target, part, switches, must_differ=must_differ)
        if self.rdrop_guard != "off" and part == "labeled" and target is not None:
            self._rdrop_guard.note_target(self, self.rdrop_distance.invalid(self.rdrop_first_view(predictions), target))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it talks to the other ranks
    def _rdrop_pass_by(self, part: str) -> None:
        must_differ = self._rdrop_must_differ(self.rdrop_views)
        self._rdrop_guard.pass_by(self, part, self._rdrop_own_switches(), must_differ=must_differ)

    def _rdrop_must_differ(self, count: int) -> bool:
        """Whether equal views are a fault: with alpha = 0 on purpose, they cost nothing but time."""
        return count > 1 and bool(self.rdrop_alpha or self._rdrop_own_alpha)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it keeps tensors of many steps
    def rdrop_note(self, kl: Tensor, ce: Tensor | None = None) -> None:
        """Let the guard note the distance of the views in a step; ``rdrop_step`` and ``rdrop_loss`` do so.

        Args:
            kl: 0 where the views are equal.
            ce: the task loss, beside which kl should not be negligible; None where it may be.
        """
        self._rdrop_guard.note(kl, ce)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks at values
    def _rdrop_part_rows(self, predict: Any, inputs: Any, examples: int, part: str) -> None:
        self._rdrop_guard.part_rows(self, predict, inputs, examples, part=part)

    def _rdrop_splits(self, predict: Any, inputs: Any, part: str) -> bool:
        """Whether the batch is doubled elsewhere than at the entrance."""
        if self._rdrop_late is None:
            return False

        def decide(decision: bool) -> bool:
            # another rank may have no unlabelled example, and then does not look for a split
            alone = part != "labeled" and not passes_meet(self)
            return decision if alone else on_all_ranks(self, decision)

        split, new = self._rdrop_late.split(self, predict, inputs, self._rdrop_own_switches().random(), decide)
        if split is not None and new:
            rank_zero_info(f"rdrop_duplicate_at={self.rdrop_duplicate_at!r}: {split}")
            if split.shared and self.rdrop_guard != "off":
                warnings.warn(
                    f"rdrop_duplicate_at={self.rdrop_duplicate_at!r}: {split.shared} lies before it and is random, and "
                    "what it drops, it drops in all views alike. Double before it, or put it into eval mode.",
                    stacklevel=3,
                )
        return split is not None

    def _rdrop_examples(self, inputs: Any, target: Any) -> int:
        """B. Separate passes take inputs whose examples cannot be told, and then the target tells."""
        if self.rdrop_passes == "joint":
            return views.batch_size(inputs, target)
        return 0 if target is None else views.batch_size(target)

    def _rdrop_own_switches(self) -> Switches:
        self._rdrop_switches = self._rdrop_switches or Switches(self)
        return self._rdrop_switches

    def _rdrop_logged(self) -> set[str]:
        return {"loss", "alpha", *self.rdrop_distance.term_names}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph that read it would be made anew for each alpha
    def _rdrop_checked_alpha(self) -> float:
        return non_negative("rdrop_alpha", self.rdrop_alpha)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # three graphs of nothing but a detach
def _outputs(terms: Terms) -> dict[str, Any]:
    """What a training_step hands to callbacks: nothing but the loss keeps the graph."""
    others = {"ce": terms.ce, "kl": terms.kl, "prediction": terms.prediction}
    return {"loss": terms.loss} | {name: map_tensors(value, Tensor.detach) for name, value in others.items()}


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(RDropMixin.__init__).parameters if name.startswith("rdrop_")]
    for name in kwargs:
        if name.startswith("rdrop"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise TypeError(f"RDropMixin has no argument {name}. {hint}")
