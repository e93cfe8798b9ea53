"""``memopt.create``: the optimizer that a spec describes, with every keyword that any spec takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from memopt.core.param_kinds import kinds as kinds_of
from memopt.keywords import PLACEMENT_DEFAULT, RULE_DEFAULT, SPEC_DEFAULT, Unset
from memopt.optimizer import Optimizer
from memopt.spec import OptimSpec


def create(
    model_or_params: torch.nn.Module | Iterable[Any],
    spec: str | OptimSpec = "adamw",
    *,
    lr: float | Tensor | Unset | None = RULE_DEFAULT,
    betas: tuple[float, ...] | Unset = RULE_DEFAULT,
    eps: float | tuple[float | None, float] | Unset = RULE_DEFAULT,
    weight_decay: float | Unset = RULE_DEFAULT,
    maximize: bool | Unset = RULE_DEFAULT,
    cautious: bool | Unset = RULE_DEFAULT,
    amsgrad: bool | Unset = RULE_DEFAULT,
    momentum: float | Unset = RULE_DEFAULT,
    dampening: float | Unset = RULE_DEFAULT,
    nesterov: bool | Unset = RULE_DEFAULT,
    alpha: float | Unset = RULE_DEFAULT,
    centered: bool | Unset = RULE_DEFAULT,
    decoupled_weight_decay: bool | Unset = RULE_DEFAULT,
    d: float | Unset | None = RULE_DEFAULT,
    beta1: float | Unset | None = RULE_DEFAULT,
    beta2_decay: float | Unset = RULE_DEFAULT,
    scale_parameter: bool | Unset = RULE_DEFAULT,
    relative_step: bool | Unset = RULE_DEFAULT,
    warmup_init: bool | Unset = RULE_DEFAULT,
    convention: Literal["absolute", "torch", "transformers"] | Unset = RULE_DEFAULT,
    t_alpha: int | Unset | None = RULE_DEFAULT,
    t_beta3: int | Unset | None = RULE_DEFAULT,
    final_lr: float | Unset = RULE_DEFAULT,
    base_lr: float | Unset | None = RULE_DEFAULT,
    gamma: float | Unset = RULE_DEFAULT,
    beta2: float | Unset = RULE_DEFAULT,
    split_rows: int | tuple[int, ...] | Unset | None = RULE_DEFAULT,
    ns_coefficients: tuple[float, float, float] | Unset = RULE_DEFAULT,
    ns_steps: int | Unset = RULE_DEFAULT,
    ns_dtype: Literal["auto", "bfloat16", "float32"] | Unset = RULE_DEFAULT,
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_norm", "none"] | Unset = RULE_DEFAULT,
    d_coef: float | Unset = RULE_DEFAULT,
    d_numerator: float | Unset = RULE_DEFAULT,
    d0: float | Unset = RULE_DEFAULT,
    beta3: float | Unset | None = RULE_DEFAULT,
    use_bias_correction: bool | Unset = RULE_DEFAULT,
    safeguard_warmup: bool | Unset = RULE_DEFAULT,
    sliced: bool | Unset = RULE_DEFAULT,
    sinkhorn_steps: int | Unset = RULE_DEFAULT,
    spectral_steps: int | Unset = RULE_DEFAULT,
    projection_rank: int | Unset = RULE_DEFAULT,
    update_proj_gap: int | Unset = RULE_DEFAULT,
    scale: float | Unset = RULE_DEFAULT,
    scale_type: Literal["channel", "tensor"] | Unset = RULE_DEFAULT,
    norm_growth: float | Unset = RULE_DEFAULT,
    lookahead_steps: int | Unset = RULE_DEFAULT,
    lookahead_rate: float | Unset = RULE_DEFAULT,
    rule: str | Unset = SPEC_DEFAULT,
    format: str | Unset = SPEC_DEFAULT,
    fallback: str | Unset = SPEC_DEFAULT,
    master: str | Unset = SPEC_DEFAULT,
    placement: str | Unset = SPEC_DEFAULT,
    partition: str | Unset = SPEC_DEFAULT,
    engine: Literal["native", "bitsandbytes"] | Unset = SPEC_DEFAULT,
    overrides: Mapping[str, str] | Unset = SPEC_DEFAULT,
    hyper: Mapping[str, Any] | Unset = SPEC_DEFAULT,
    rules: Mapping[str, Mapping[str, Any]] | Unset = SPEC_DEFAULT,
    options: Mapping[str, Any] | Unset = SPEC_DEFAULT,
    directory: str | PathLike[str] | Unset = PLACEMENT_DEFAULT,
    workspace: int | str | Unset = PLACEMENT_DEFAULT,
    resident: int | str | Unset = PLACEMENT_DEFAULT,
    offload_gradients: bool | Literal["early"] | Unset = PLACEMENT_DEFAULT,
    nonfinite: Literal["skip", "raise", "propagate"] = "skip",
    seed: int = 0,
    process_group: Any = None,
    kinds: Mapping[str, str] | None = None,
    capturable: bool = False,
    on_mismatch: Literal["convert", "refuse"] = "convert",
    max_grad_norm: float | None = None,
    **unknown: NoReturn,
) -> Optimizer:
    """Make the optimizer that ``spec`` describes; an ordinary ``torch.optim.Optimizer`` to everything around it.

    A keyword that the spec's rule or placement does not have is an error, never ignored.

    Args:
        model_or_params: A model (all its parameters, under their names), an iterable of parameters or of
            ``(name, parameter)`` pairs, or a list of param groups as of ``torch.optim``.
        spec: ``RULE[-FORMAT[.FORMAT]][+MASTER][@PLACEMENT][/PARTITION]``, a name of another tool for the same
            (``"paged_adamw_8bit"``), or an :class:`OptimSpec`. ``memopt list`` shows what there is.
        lr: Step size; a schedule changes it in ``param_groups``. A Tensor of one element is read at each step.
            None, for adafactor with ``convention="transformers"`` alone, lets the rule make its own.
            Default 1e-3; rmsprop, apollo, apollomini 1e-2; came 2e-4; lion 1e-4; prodigy 1.
        betas: Decay of each running mean, per step, in [0, 1): of the gradient, of its square, and of ademamix's slow
            mean or came's residual. adafactor, sgd and rmsprop have none.
            Default (0.9, 0.999); lion, stableadamw (0.9, 0.99); came, ademamix (0.9, 0.999, 0.9999).
        eps: Added to the denominator. For adafactor and came a pair: the smallest g², and the smallest RMS of a
            parameter (adafactor) or squared residual (came). sgd and lion have none.
            Of muon the least norm that a matrix is divided by.
            Default 1e-8; muon 1e-7; lamb 1e-6; adafactor (1e-30, 1e-3); came (1e-30, 1e-16).
        weight_decay: Decoupled (``p <- p * (1 - lr * weight_decay)``), and for adam, sgd, rmsprop, radam and adabound
            an L2 term in the gradient.
            Default 0; adamw, lamb, ademamix, adammini, stableadamw 1e-2; muon 0.1.
        maximize: Go up the gradient. Every rule. Default False.
        cautious: Leave out of each update what does not go against the gradient, and scale the rest up. Every rule but
            prodigy, on the plain torch path. Default False.
        amsgrad: Divide by the largest second moment so far, one more moment. adamw, adam. Default False.
        momentum: Decay of the momentum buffer; 0 keeps none. sgd, rmsprop, muon, and in ``rules`` scale_head.
            Default 0; muon 0.95.
        dampening: Share of the gradient that does not enter the momentum. sgd. Default 0.
        nesterov: Look one step of momentum ahead. sgd, muon, and on the plain torch path adam, adamw, radam, adabound,
            lamb, ademamix, adammini, stableadamw. Default False; muon True.
        alpha: rmsprop: decay of the mean of squares. ademamix: weight of the slow mean.
            Default 0.99; ademamix 5.
        centered: Divide by the standard deviation instead of the root mean square. rmsprop, 32bit. Default False.
        decoupled_weight_decay: Decay as adamw does. radam, prodigy. Default False; prodigy True.
        d: Largest RMS of an update; larger ones are scaled down to it. adafactor, came, stableadamw. Of prodigy where
            its estimate stands, which each step may raise; None is ``d0``. Default 1; prodigy None.
        beta1: Decay of a first moment; None keeps none. adafactor. Default None.
        beta2_decay: Exponent c of the second moment's decay ``1 - t^c``, at most 0. adafactor. Default -0.8.
        scale_parameter: Scale the rate with the parameter's RMS. adafactor; the conventions of torch and transformers
            begin with True. Default False.
        relative_step: Make the rate from the step count. adafactor; the convention of torch begins with True, that of
            transformers where no ``lr`` is given. Default False.
        warmup_init: Let that rate grow over the first 10,000 steps. The same. Default False.
        convention: What adafactor makes of ``lr``: ``"absolute"`` takes it as it stands, ``"torch"`` and
            ``"transformers"`` scale it as these do. Default "absolute".
        t_alpha: Steps over which ``alpha`` grows from 0; None has it at once. ademamix. Default None.
        t_beta3: Steps over which the slow mean's half-life grows; None has it at once. ademamix. Default None.
        final_lr: Rate of SGD at the end, as for the initial ``lr``. adabound. Default 0.1.
        base_lr: The rate that ``final_lr`` belongs to; None is the one that the group was made with. adabound.
            Default None.
        gamma: Speed at which the bounds close, per step, in (0, 1). adabound. Default 1e-3.
        beta2: Decay of the mean square of each row, by which NorMuon divides it; 0 is Muon, without. muon. Default 0.
        split_rows: What a fused matrix is, one below the other: so many of one height, or of these heights. For the
            param groups that hold such, as ``{"params": [...], "split_rows": 3}``. muon. Default None.
        ns_coefficients: a, b, c of the Newton-Schulz iteration. muon. Default (3.4445, -4.775, 2.0315).
        ns_steps: Iterations, from 1 to 99. muon. Default 5.
        ns_dtype: What they are taken in; "auto" is bfloat16 where the processor multiplies it faster than fp32. muon.
            Default "auto".
        adjust_lr_fn: How the rate is scaled by a matrix's shape: as torch.optim.Muon's, dion's, or not at all. muon.
            Default "match_rms_adamw".
        d_coef: What the estimate is multiplied by. prodigy. Default 1.
        d_numerator: Where the sum stands that the estimate is made of. prodigy. Default 0.
        d0: Where the estimate begins. prodigy. Default 1e-6.
        beta3: Decay of the estimate's statistics; None is the root of the second beta. prodigy. Default None.
        use_bias_correction: Adam's bias corrections in the step. prodigy. Default False.
        safeguard_warmup: Leave the rate out of the estimate's denominator, for schedules with a warm-up. prodigy.
            Default False.
        sliced: Keep the estimate's statistics of every 11th element alone, in 32 bits. prodigy. Default False.
        sinkhorn_steps: How often rows, then columns, are brought to one size, from 1 to 99. sinkgd. Default 5.
        spectral_steps: Power iterations for the spectral norm of an update, which is then brought to
            sqrt(rows / columns); 0 leaves it as it is. sinkgd. Default 0.
        projection_rank: Dimensions to which the shorter side of a matrix is projected. apollo, apollomini.
            Default 256; apollomini 1.
        update_proj_gap: Steps after which the projection is drawn anew. The same. Default 200.
        scale: What an update is multiplied by. The same. Default 1; apollomini 128**0.5.
        scale_type: ``"channel"``, each row or column of the longer side is scaled, or ``"tensor"``, each matrix.
            The same. Default "channel"; apollomini "tensor".
        norm_growth: How many times as large as the last one an update may be; 0 is without a limit. The same.
            Default 1.01.
        lookahead_steps: Steps between two updates of the slow weights. lookahead(RULE). Default 5.
        lookahead_rate: Share of the way to the fast weights, in (0, 1]. lookahead(RULE). Default 0.5.
        rule, format, fallback, master, placement, partition: What the spec leaves to its default, or, beside an
            OptimSpec, values in the place of its own.
        engine: Whose kernels run: ``"native"`` or ``"bitsandbytes"``. Default "native".
        overrides: Shell-style pattern over parameter names -> ``FORMAT``, ``RULE`` or ``RULE-FORMAT``, with or without
            ``@PLACEMENT``, or ``@PLACEMENT`` alone; the first match wins. Default none.
        rules: Hyperparameters of the spec's other rules (its fallback's, those of overrides), by rule:
            ``{"adamw": {"lr": 3e-4, "betas": (0.9, 0.95)}}``. ``lr``, ``weight_decay``, ``maximize`` and ``cautious``
            are those of the spec's rule where nothing else is said.
        hyper, options: Hyperparameters and placement options as mappings, beside those given as keywords.
        directory: ``@disk``: where the files are, which survive the process. Default: a temporary one.
        workspace: ``@host``, ``@cpu``, ``@disk``: bytes, or a size such as ``"1GiB"``, that state is streamed through.
            Default 256 MiB, or less where the state is smaller.
        resident: ``@paged``: bytes of state that stay in memory after a step. Default: left to the system.
        offload_gradients: ``@cpu``: ``False``, gradients are copied to the host in the step; ``"early"``, in
            ``backward()``, as many as the workspace holds, and they stay on the device; ``True``, all of them in
            ``backward()``, and the device's memory is freed. Default False.
        nonfinite: NaN or Inf in a gradient: ``"skip"`` the step and count it in ``skipped_steps``, ``"raise"`` before
            anything changes, or ``"propagate"``, not looking, as torch does.
        seed: Integer that stochastic rounding is drawn from; the same seed gives the same bits.
        process_group: ``torch.distributed`` group that shares the state under ``/zero1`` and ``/zero2``. Default: all
            ranks.
        kinds: Parameter name -> ``"an embedding"``, ``"an output head"``, ``"a gate"`` or ``"a norm"``, where a rule of
            hidden matrices cannot see it from the model (:func:`memopt.core.param_kinds.kinds` of it) or from names.
        capturable: Keep the step counts on the device, so that a CUDA graph can hold a step.
        on_mismatch: What ``load_state_dict`` does with state of another spec or tool: ``"convert"`` it, with a warning
            that says what was lost, or ``"refuse"`` it.
        max_grad_norm: Clip inside the step: gradients whose norm, of all of them together, is larger are scaled down
            to it, in registers; ``p.grad`` stays as it is, and ``opt.grad_norm`` is the norm. ``inf`` measures only; a
            group may have its own. Default None, no clipping.
        unknown: no keyword has another name.

    Returns:
        The :class:`Optimizer`. No state is allocated before a parameter's first step (or ``init_state()``).

    Raises:
        SpecError: (a ValueError) for a value that is not allowed and for a keyword that the rule or placement has not.
        ImportError: for an engine whose package is not installed, with the line that installs it.

    >>> import torch, memopt
    >>> model = torch.nn.Linear(1024, 1024)
    >>> opt = memopt.create(model, "adamw-8bit", lr=2e-5, betas=(0.9, 0.95), overrides={"bias": "32bit"})
    >>> model(torch.randn(2, 1024)).sum().backward()
    >>> opt.step()
    >>> opt.ledger().nbytes == memopt.price(model, "adamw-8bit", overrides={"bias": "32bit"}).nbytes
    True
    >>> memopt.create(model, "lion", eps=1e-8)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    memopt.core.hyperparameters.SpecError: lion has no hyperparameter 'eps'; it has lr, betas, weight_decay, ...
    """
    given = {name: value for name, value in locals().items() if not isinstance(value, Unset)}  # the arguments, so far
    del given["model_or_params"], given["spec"], given["unknown"]
    model = model_or_params
    params = model.named_parameters() if isinstance(model, torch.nn.Module) else model
    given["kinds"] = {**kinds_of(model), **(kinds or {})}
    return Optimizer(params, spec, **given, **unknown)
