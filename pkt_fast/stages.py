"""Training the paired layers: all at once, or stage by stage from shallow to deep.

The stages share the steps of the transfer, so that every schedule makes as many updates.

A stage trains the adapters of its layers on the *tail*, the target from the first of them up: the
blocks below are frozen, so their output is computed once and stored (:func:`prefix_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .anatomy import Anatomy
from .config import TransferConfig
from .errors import ConfigError
from .inputs import TransferInputs
from .methods import DeltaMaker, MethodInputs, maker_of
from .objectives import FrozenHead, needs_target_head, training_terms
from .pairing import LayerPair
from .phases import INPUT, layer_column, longest_first, run_prefix
from .report import loss_names
from .ridge import RidgeMaker, output_projections, solve_layers
from .steering import Loader, Record, StepPlan, Tail, plan_steps, share_steps, train
from .stores import ActivationStore, model_fingerprint


def check_adaptable(inputs: TransferInputs, pairs: Sequence[LayerPair]) -> None:
    """Refuse, before any pass over the data, layers that have nothing to adapt, no output
    projection where one is solved for, or no step for each of the frontier's stages.

    Raises:
        ConfigError: ``target_modules`` match nothing, or leave the output projection out; fewer
            steps than stages.
        ModelError: the interface has no output projection that can be adapted.
    """
    target, modules = Anatomy.of(inputs.target), inputs.config.target_modules
    layers = [pair.target for pair in pairs]
    for layer in layers:
        target.lora_targets(layer, modules)
    if _solves(inputs):
        output_projections(target, layers, inputs.config.interface, modules)
    check_budget(
        inputs.config, len(plan_steps(inputs.examples.lengths, inputs.config)), len(layers)
    )


def check_budget(config: TransferConfig, steps: int, layers: int) -> None:
    """Refuse a frontier over ``layers`` that leaves some of them without any of the ``steps``.

    Raises:
        ConfigError: fewer steps than layers.
    """
    if config.schedule == "frontier" and config.solver == "adamw" and steps < layers:
        raise ConfigError(
            f"schedule='frontier' shares the steps of a transfer ({steps}) among its layers "
            f"({layers}): raise epochs or steps, lower batch_size, or name fewer layers"
        )


def _solves(inputs: TransferInputs) -> bool:
    """Whether the closed-form solution is wanted, as the result or as a start."""
    return inputs.config.solver == "ridge" or inputs.config.warm_start


def make_delta_maker(inputs: TransferInputs, pairs: Sequence[LayerPair]) -> DeltaMaker:
    """What trains: LoRA, or what the method makes of the source's weights."""
    given = MethodInputs(
        inputs.config,
        inputs.source,
        inputs.target,
        pairs,
        inputs.aligned.examples,
        inputs.examples,
        inputs.pad_token_ids,
    )
    if inputs.config.solver == "ridge":
        return RidgeMaker(given)
    maker = maker_of(inputs.config.method)
    runs = [inputs.source, inputs.target] if maker.runs_target else [inputs.source]
    with inputs.phases.phase("prepare delta", 1), inputs.visiting(*runs):
        return maker(given)


def steer(
    inputs: TransferInputs,
    maker: DeltaMaker,
    supervision: ActivationStore | None,
    source_head: FrozenHead | None,
) -> tuple[nn.Module, list[Record]]:
    """Train the delta that ``maker`` attaches to the target.

    Args:
        inputs: the target and the data.
        maker: what trains, and on which layers.
        supervision: rows of the source pass, if the losses need any.
        source_head: the source's head, if the output loss needs it.

    Returns:
        The target with its adapter (a PEFT model), and one record a step.  After an error the
        target has its own weights back.
    """
    stages = _Stages(inputs, maker, supervision, source_head)
    history: list[Record] = []
    joint = inputs.config.schedule == "joint"
    # The frontier goes from shallow to deep; earlier layers stay as trained.
    steered = [maker.layers] if joint else [[layer] for layer in maker.layers]
    planned = plan_steps(inputs.examples.lengths, inputs.config)
    try:
        model = maker.attach(inputs.target)
        for layers, steps in zip(steered, share_steps(planned, len(steered)), strict=True):
            history += stages.train(model, layers, steps, first_step=len(history))
        return maker.finish(model), history
    except BaseException:
        maker.abandon()
        raise


@dataclass(frozen=True, eq=False)
class _Stages:
    """What every stage of a training goes by."""

    inputs: TransferInputs
    maker: DeltaMaker
    supervision: ActivationStore | None
    source_head: FrozenHead | None

    def train(
        self, model: nn.Module, layers: Sequence[int], steps: Sequence[StepPlan], first_step: int
    ) -> list[Record]:
        """Train the adapters of ``layers`` in ``steps`` on the tail that starts at the first of
        them.
        """
        inputs = self.inputs
        parameters = self.maker.parameters(model, layers)
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        loader = Loader(
            inputs.examples,
            self.supervision,
            prefix_rows(inputs, model, layers[0]),
            inputs.device,
            inputs.pad_token_ids[1],
            Anatomy.of(model).head.weight.dtype,
        )
        if _solves(inputs):
            solution = self._solve(model, layers, loader, first_step)
            if inputs.config.solver == "ridge":
                return solution
        return self._descend(model, layers, loader, parameters, steps, first_step)

    def _solve(
        self, model: nn.Module, layers: Sequence[int], loader: Loader, first_step: int
    ) -> list[Record]:
        """The closed-form change of ``layers``, written into the adapter."""
        tokens = sum(self.inputs.examples.lengths)
        with self.inputs.phases.counted("solve", tokens) as advance:
            return solve_layers(
                model,
                layers,
                loader,
                self.inputs.config,
                advance=advance,
                first_step=first_step,
            )

    def _descend(
        self,
        model: nn.Module,
        layers: Sequence[int],
        loader: Loader,
        parameters: list[nn.Parameter],
        steps: Sequence[StepPlan],
        first_step: int,
    ) -> list[Record]:
        """Minimise L_layer + L_out (paper, "training") over the adapters of ``layers``."""
        config, phases = self.inputs.config, self.inputs.phases
        anatomy = Anatomy.of(model)
        tail = Tail(model, layers[0], layers, config.interface, needs_target_head(config))
        terms = training_terms(
            config,
            layers,
            anatomy.head,
            anatomy.head_transform(),
            self.source_head,
            self.inputs.vocabulary,
            _widths(anatomy, self.supervision, layers),
        )
        learned = [parameter for term in terms for parameter in term.parameters]
        lengths = self.inputs.examples.lengths
        whole = len(layers) == len(self.maker.layers)
        name = "steer" if whole else f"steer layer {layers[0]}"
        with phases.phase(name, len(steps)) as update:

            def on_step(record: Record) -> None:
                update(1, " ".join(f"{k} {record[k]:.4f}" for k in loss_names([record])))

            history = train(
                tail,
                loader,
                terms,
                parameters + learned,
                steps,
                config,
                on_step=on_step,
                first_step=first_step,
            )
        visited = (lengths[i] for step in steps for micro in step.micro for i in micro)
        phases.clock.count(name, sum(visited))
        return history


def _widths(
    target: Anatomy, supervision: ActivationStore | None, layers: Sequence[int]
) -> tuple[int, int] | None:
    """Width of the target's layers, and of the stored rows that steer ``layers``."""
    column = None if supervision is None else supervision.columns.get(layer_column(layers[0]))
    return None if column is None else (target.hidden_size, column.width)


def prefix_rows(inputs: TransferInputs, model: nn.Module, first: int) -> ActivationStore | None:
    """The input of block ``first`` for all real tokens, (tokens, D); block 0 starts at the
    embeddings, so there is nothing to store.
    """
    if first == 0:
        return None
    anatomy = Anatomy.of(model)

    def fill(store: ActivationStore) -> None:
        with inputs.phases.counted("target pass", sum(inputs.examples.lengths)) as advance:
            run_prefix(
                model,
                inputs.examples,
                first,
                store,
                batch_size=inputs.config.micro_batch_size,
                pad_token_id=inputs.pad_token_ids[1],
                advance=advance,
            )

    return inputs.store_place.filled(
        "target",
        inputs.examples.lengths,
        longest_first(inputs.examples.lengths),
        {INPUT: (anatomy.hidden_size, anatomy.head.weight.dtype)},
        {
            "target": model_fingerprint(model),
            "data": inputs.examples.fingerprint(),
            "block": first,
        },
        fill,
    )
