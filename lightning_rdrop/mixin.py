"""RDropMixin: the one place where the loss meets Lightning."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_rdrop import dropout, guard, unlabeled, views
from lightning_rdrop._lightning import MixinBase
from lightning_rdrop.arguments import non_negative, one_of
from lightning_rdrop.distance import Categorical, Distance
from lightning_rdrop.duplicate_at import Split
from lightning_rdrop.find_split import LateDuplication
from lightning_rdrop.loss import Head, RDropLoss
from lightning_rdrop.regularizers.regularizer import Regularizer
from lightning_rdrop.terms import Terms

TARGET_KEYS = ("labels", "label", "target")
"""Under one of these names a mapping carries its target."""


class RDropMixin(MixinBase):
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
        rdrop_views: K, the predictions of an example; 1 is ordinary training.
        rdrop_distance: D of the general form; ``None`` is :class:`~lightning_rdrop.Categorical`. It is not saved
            among the hyper-parameters: give it again to ``load_from_checkpoint``.
        rdrop_passes: ``"joint"`` is one forward of K * B rows; ``"separate"`` is K forwards of B, for a model whose
            randomness is shared by a whole batch (LayerDrop) and for batches that cannot be doubled.
        rdrop_duplicate_at: the submodule before which the batch is doubled, so that what lies before runs once: its
            dotted name or the end of it, several, a glob, or ``"auto"`` for the latest place before which nothing is
            random. ``None`` doubles at the entrance. See :mod:`lightning_rdrop.find_split`.
        rdrop_unlabeled_weight: w, >= 0, of all that unlabelled examples add: kl, and the regularizers that need no
            target; a plain attribute. While it is 0 they have no pass, and training is supervised to the bit.
        rdrop_labeled_weight: :math:`w_\text{labeled}`, >= 0, where there are unlabelled examples. With 0 the labelled
            ones have but one pass, and plain cross-entropy, as in Su's experiments.
        rdrop_regularizers: further terms of the loss, such as :class:`~lightning_rdrop.VAT`, each logged by its name;
            see :class:`~lightning_rdrop.Regularizer`. They are not saved among the hyper-parameters.
        rdrop_guard: what happens where training would be silently wrong, such as views that cannot differ because
            dropout is off: ``"error"``, ``"warn"`` or ``"off"``. Checked on the first batch, and again when a mode
            changes; NaN is looked for whenever the Trainer logs.

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

    _rdrop_unsaved: ClassVar[tuple[str, ...]] = ("rdrop_distance", "rdrop_regularizers")

    def __init__(
        self,
        *args: Any,
        rdrop_alpha: float = 4.0,
        rdrop_views: int = 2,
        rdrop_distance: Distance | None = None,
        rdrop_passes: Literal["joint", "separate"] = "joint",
        rdrop_duplicate_at: str | Sequence[str] | None = None,
        rdrop_unlabeled_weight: float = 1.0,
        rdrop_labeled_weight: float = 1.0,
        rdrop_regularizers: Sequence[Regularizer] = (),
        rdrop_guard: Literal["error", "warn", "off"] = "error",
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs)
        super().__init__(*args, **kwargs)
        self.rdrop_alpha = non_negative("rdrop_alpha", rdrop_alpha)
        if isinstance(rdrop_views, bool) or not isinstance(rdrop_views, int) or rdrop_views < 1:
            raise ValueError(f"rdrop_views must be an int >= 1 (1 is ordinary training), got {rdrop_views!r}.")
        self.rdrop_views = rdrop_views
        if not isinstance(rdrop_distance, (Distance, type(None))):
            raise TypeError(f"rdrop_distance must be a Distance or None, got {rdrop_distance!r}.")
        self.rdrop_distance = Categorical() if rdrop_distance is None else rdrop_distance
        self.rdrop_passes = one_of("rdrop_passes", rdrop_passes, ("joint", "separate"))
        self.rdrop_duplicate_at = _check_duplicate_at(rdrop_duplicate_at, rdrop_passes)
        self.rdrop_unlabeled_weight = non_negative("rdrop_unlabeled_weight", rdrop_unlabeled_weight)
        self.rdrop_labeled_weight = non_negative("rdrop_labeled_weight", rdrop_labeled_weight)
        self.rdrop_regularizers = nn.ModuleList(_check_regularizers(rdrop_regularizers, self.rdrop_distance))
        self.rdrop_guard = one_of("rdrop_guard", rdrop_guard, ("error", "warn", "off"))
        self._rdrop_own_alpha = self.rdrop_alpha
        self._rdrop_guarded: dict[str, list[bool]] = {}
        self._rdrop_late = LateDuplication(rdrop_duplicate_at, rdrop_views) if rdrop_duplicate_at else None
        self._rdrop_rows: Tensor | None = None  # of the last training step
        self._rdrop_nan = {"labeled": guard.NanWatch(), "unlabeled": guard.NanWatch(" of the unlabelled part")}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(RDropMixin)]
        if nn.Module in before:
            others = ", ".join(base.__name__ for base in cls.__bases__ if not issubclass(base, RDropMixin))
            raise TypeError(
                f"{cls.__name__} inherits RDropMixin after {others}, which would hide its training_step. "
                f"Put the mixin first: class {cls.__name__}(RDropMixin, {others})"
            )
        own = [value.__code__.co_names for value in vars(cls).values() if inspect.isfunction(value)]
        used = any("rdrop_step" in names or names.count("training_step") for names in own)
        if "training_step" in vars(cls) and not used:
            warnings.warn(
                f"{cls.__name__} has a training_step of its own, which hides the mixin's, and never calls rdrop_step: "
                "it trains without R-Drop. Delete it, or begin it with terms = self.rdrop_step(batch).",
                stacklevel=2,
            )

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
        self._rdrop_rows = terms.rows
        return {"loss": terms.loss, "ce": terms.ce, "kl": terms.kl, "prediction": terms.prediction}

    def rdrop_step(self, batch: Any) -> Terms:
        """The whole computation without logging, for manual optimisation or a training_step of one's own."""
        labeled, others = unlabeled.parts(batch)
        if others is None:
            return self._rdrop_labeled(labeled)
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # self.log inside a compiled training_step crashes in Lightning 2.6
    def rdrop_log(self, terms: Terms) -> None:
        """Log the terms of a step, with the number of examples (never of views) as the batch size.

        The values of a step are those of one rank, which takes no collective. Those of an epoch, ``train/ce_epoch``
        and ``train/kl_epoch``, are means over the rows that counted in its batches on all ranks.
        """
        task, consistency = self.rdrop_distance.term_names
        self.log("train/loss", terms.loss, batch_size=terms.examples)
        values: dict[str, Any] = {task: terms.ce, consistency: terms.kl, "alpha": self.rdrop_alpha} | terms.extra
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=terms.examples)
        rows: Any = terms.examples if terms.rows is None else terms.rows  # a tensor, which is not waited for
        for name, value in ((task, terms.ce), (consistency, terms.kl)):
            self.log(f"train/{name}_epoch", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=rows)

    def rdrop_unpack(self, batch: Any) -> tuple[Any, Any]:
        """Hook: the inputs of the network and the target, out of a batch.

        Reads a pair ``(inputs, target)``, and mappings with ``labels``, ``label`` or ``target``, whose other entries
        are the inputs.

        Raises:
            ValueError: the batch is neither.
        """
        if isinstance(batch, Mapping):
            keys = [key for key in TARGET_KEYS if key in batch]
            if len(keys) == 1:
                return {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]
            found = f"a mapping with the keys {list(batch)}"
        elif isinstance(batch, (tuple, list)):
            if len(batch) == 2:
                return batch[0], batch[1]
            found = f"a {type(batch).__name__} of {len(batch)} elements"
        else:
            found = f"a {type(batch).__name__}"
        raise ValueError(
            f"The batch is {found}, in which no target can be told from the inputs. A batch is a pair (inputs, target) "
            f"or a mapping with one of the keys {', '.join(TARGET_KEYS)}; for anything else override "
            "rdrop_unpack(self, batch) to return (inputs, target)."
        )

    def rdrop_unpack_unlabeled(self, batch: Any) -> tuple[Any, Any]:
        """Hook: the inputs of the network out of a batch without labels, and None or what tells which rows count.

        A tensor, a mapping without ``labels``, ``label`` or ``target``, or the one element of a tuple or list, is the
        inputs. All else goes to :meth:`rdrop_unpack`. Labels that are found there are not learned from; where they
        are -100 (the distance's ``ignore_index``), a row does not count. Without labels, nor does a token whose
        ``attention_mask`` is 0.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch[0], None
        if isinstance(batch, Tensor) or (isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS)):
            return batch, None
        return self.rdrop_unpack(batch)

    def rdrop_predict(self, inputs: Any) -> Any:
        """Hook: the prediction for some inputs; calls ``forward``, and takes ``.logits`` of a model output."""
        output = self(**inputs) if isinstance(inputs, Mapping) else self(inputs)
        return getattr(output, "logits", output)

    def rdrop_head(self) -> Head | None:
        """Hook: the linear output layer whose logits training never holds; then :meth:`rdrop_hidden` gives its inputs.

        It saves most of the memory of a large vocabulary. ``rdrop_predict`` gives the logits as ever, for validation
        and whoever else asks, but those of a training step are not there: its ``prediction`` is None.
        """
        return None

    def rdrop_hidden(self, inputs: Any) -> Tensor:
        """Hook: the hidden states (B, ..., D) of some inputs, of which ``rdrop_head`` makes the prediction."""
        raise NotImplementedError("rdrop_head gives an output layer: override rdrop_hidden to give its inputs.")

    def save_hyperparameters(
        self, *args: Any, ignore: Any = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """As Lightning's, without the modules among the arguments that would make a checkpoint unsafe to load
        (``weights_only=True`` refuses them). Where the CLI gives them, as plain configuration, they are kept."""
        current = inspect.currentframe()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"Attribute '({'|'.join(self._rdrop_unsaved)})'")
            super().save_hyperparameters(
                *args, ignore=ignore, frame=frame or (current and current.f_back), logger=logger
            )
        saved: Any
        for saved in (self._hparams, self._hparams_initial):
            for name in self._rdrop_unsaved:
                value = saved.get(name)
                parts = value if isinstance(value, (list, tuple)) else [value]
                if any(isinstance(part, nn.Module) for part in parts):
                    del saved[name]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph that read it would be made anew for each alpha
    def _rdrop_checked_alpha(self) -> float:
        return non_negative("rdrop_alpha", self.rdrop_alpha)

    def _rdrop_labeled(self, batch: Any, weight: float = 1.0) -> Terms:
        inputs, target = self.rdrop_unpack(batch)
        joint = self.rdrop_passes == "joint"
        examples = views.batch_size(inputs, target) if joint else views.batch_size(target)

        def predict() -> Tensor:
            if not weight:
                return views.split(self.rdrop_predict(inputs), 1, examples)
            return self._rdrop_predictions(inputs, examples)

        predictions = predict()
        self._rdrop_guard_batch(predictions, inputs, target, predict)
        alpha = weight * self._rdrop_checked_alpha()
        terms: Terms = RDropLoss(self.rdrop_distance)(predictions, target, alpha, self.rdrop_head())
        if self.rdrop_regularizers:
            terms = self._rdrop_regularize(terms, inputs, target, self.rdrop_regularizers)
        return dataclasses.replace(terms, examples=examples)

    def _rdrop_unlabeled(self, batch: Any, labeled: Terms) -> Terms | None:
        """alpha kl of unlabelled examples, and the regularizers that need no target; None where there is neither."""
        regularizers = [one for one in self.rdrop_regularizers if not one.uses_target]
        if self.rdrop_views == 1 and not regularizers:
            return None
        inputs, target = self.rdrop_unpack_unlabeled(batch)
        if (ignore_index := getattr(self.rdrop_distance, "ignore_index", None)) is not None:
            target = unlabeled.counted(inputs, target, labeled.prediction.dim() - 1, ignore_index)
        zero = torch.zeros_like(labeled.ce)
        terms = Terms(loss=zero, ce=zero, kl=zero)
        if self.rdrop_views > 1:
            draw = self._rdrop_drawn(inputs)
            predictions = draw()
            self._rdrop_guard_batch(predictions, inputs, target, draw, "unlabeled")
            alpha = self._rdrop_checked_alpha()
            terms = RDropLoss(self.rdrop_distance).consistency(predictions, alpha, target)
        return self._rdrop_regularize(terms, inputs, target, regularizers) if regularizers else terms

    def _rdrop_drawn(self, inputs: Any) -> Callable[[], Tensor]:
        """What draws K predictions of unlabelled inputs."""
        examples = views.batch_size(inputs) if self.rdrop_passes == "joint" else 0  # separate ones never ask
        return functools.partial(self._rdrop_predictions, inputs, examples)

    def _rdrop_predictions(self, inputs: Any, examples: int) -> Tensor:
        """K predictions of the same inputs, (K, N, ...), or the hidden states of which a head makes them."""
        predict = self.rdrop_predict if self.rdrop_head() is None else self.rdrop_hidden
        if self.rdrop_passes == "separate":
            return torch.stack([predict(inputs) for _ in range(self.rdrop_views)])
        split = self._rdrop_split(predict, inputs)
        if split is None:
            prediction = predict(views.duplicate(inputs, self.rdrop_views))
        else:
            prediction = split.predict(self, predict, inputs, self.rdrop_views)
        return views.split(prediction, self.rdrop_views, examples)

    def _rdrop_split(self, predict: Callable[[Any], Any], inputs: Any) -> Split | None:
        """Where the batch is doubled, if not at the entrance."""
        if self._rdrop_late is None or self.rdrop_views == 1:
            return None
        split, new = self._rdrop_late.split(self, predict, inputs, self._rdrop_modes(), self._rdrop_on_all_ranks)
        if split is not None and new:
            rank_zero_info(f"rdrop_duplicate_at={self.rdrop_duplicate_at!r}: {split}")
            if split.shared and self.rdrop_guard != "off":
                warnings.warn(
                    f"rdrop_duplicate_at={self.rdrop_duplicate_at!r}: {split.shared} lies before it and is random, and "
                    "what it drops, it drops in all views alike. Double before it, or put it into eval mode.",
                    stacklevel=3,
                )
        return split

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # they differentiate inside the step
    def _rdrop_regularize(self, terms: Terms, inputs: Any, target: Any, regularizers: Iterable[Any]) -> Terms:
        loss, extra = terms.loss, {}
        for regularizer in regularizers:
            term = regularizer(self, inputs, target).mean
            loss, extra[regularizer.name] = loss + regularizer.weight * term, term.detach()
        return dataclasses.replace(terms, loss=loss, extra=extra)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rdrop_guard_batch(
        self, predictions: Tensor, inputs: Any, target: Any, draw: Callable[[], Tensor], part: str = "labeled"
    ) -> None:
        """Look at values, which waits for the device: on a first batch, after a change of mode, and at each log."""
        if self.rdrop_guard == "off":
            return
        every = getattr(self._trainer, "log_every_n_steps", 1)
        watch = self._rdrop_nan[part]
        read = not every or watch.batches % every == 0
        watch.look(predictions)
        if read:
            self._rdrop_complain(watch.reason())
        modes = self._rdrop_modes()
        if modes == self._rdrop_guarded.get(part):
            return
        self._rdrop_guarded[part] = modes
        ignore_index = getattr(self.rdrop_distance, "ignore_index", -100)
        if part == "labeled":
            head = self.rdrop_head()
            self.rdrop_distance.check(head.like_logits(predictions[0]) if head else predictions[0], target)
            self._rdrop_complain(guard.unshifted(inputs, target, ignore_index))
        else:
            self._rdrop_complain(guard.none_counts(target, ignore_index))
        self._rdrop_complain(guard.fed_its_source(self, inputs))
        if len(predictions) == 1 or not (self.rdrop_alpha or self._rdrop_own_alpha):
            return  # with alpha = 0 on purpose, equal views cost nothing but time
        reason = guard.diagnose(self, draw, predictions, self._rdrop_on_all_ranks)
        self._rdrop_complain(reason)
        if reason is None and (dead := dropout.explain_dead(self)):
            warnings.warn(dead, stacklevel=2)  # a live head hides a dead backbone

    def _rdrop_complain(self, reason: str | None) -> None:
        if reason is not None and self.rdrop_guard == "error":
            raise ValueError(reason)
        if reason is not None:
            warnings.warn(reason, stacklevel=3)

    def _rdrop_modes(self) -> list[bool]:
        return [module.training for module in self._rdrop_modules]

    def _rdrop_on_all_ranks(self, decision: bool) -> bool:
        owner = self._trainer or self._fabric
        return bool(owner.strategy.reduce_boolean_decision(decision)) if owner else decision

    @functools.cached_property
    def _rdrop_modules(self) -> list[nn.Module]:
        """A list: some microseconds a step, where a walk through the modules would take hundreds."""
        return list(self.modules())


def _check_duplicate_at(at: str | Sequence[str] | None, passes: str) -> str | Sequence[str] | None:
    if at is None:
        return None
    if not at or not all(isinstance(name, str) for name in at):
        raise ValueError(f"rdrop_duplicate_at must be the name of a submodule, several, 'auto' or None, got {at!r}.")
    if passes == "separate":
        raise ValueError(
            f"rdrop_duplicate_at={at!r} doubles the batch of one pass, and rdrop_passes='separate' doubles none. "
            "Give one of them."
        )
    return at


def _check_regularizers(regularizers: Sequence[Regularizer], distance: Distance) -> Sequence[Regularizer]:
    if isinstance(regularizers, Regularizer) or not all(isinstance(part, Regularizer) for part in regularizers):
        raise TypeError(f"rdrop_regularizers must be a list of regularizers, such as [VAT()], got {regularizers!r}.")
    taken = {"loss", "alpha", *distance.term_names}
    for regularizer in regularizers:
        if regularizer.name in taken:
            raise ValueError(
                f"rdrop_regularizers: train/{regularizer.name} would be logged twice. Each needs a name of its own: "
                f"class Another({type(regularizer).__name__}): name = 'another'"
            )
        taken.add(regularizer.name)
    return regularizers


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(RDropMixin.__init__).parameters if name.startswith("rdrop_")]
    for name in kwargs:
        if name.startswith("rdrop"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise TypeError(f"{name} is no argument of RDropMixin. {hint}")
