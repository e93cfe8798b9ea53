"""Well-formed inputs of every kind that is read, small ones: what the fuzzer changes.

An input is a folder: ``{name: content}``.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tempfile
import warnings
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import memopt
from memopt.formats.foreign.bitsandbytes import code_book

Folder = dict[str, Any]
SPECS = ("adamw", "adamw-8bit", "adafactor", "adamw-factored", "adamw-4bit", "adamw-8bit.factored", "muon-8bit(adamw)")


def corpus() -> list[tuple[str, Folder]]:
    """``(kind, folder)``"""
    torch.manual_seed(0)
    found: list[tuple[str, Folder]] = []
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    for spec in (*SPECS, "adamw-bf16+kahan"):
        net = copy.deepcopy(model).to(torch.bfloat16 if "+" in spec else torch.float32)
        opt = memopt.create(net, spec)
        _step(net, opt)
        found.append(("memopt", _saved(net, opt)))
    found += [("memopt", _of_ranks(model, mesh)) for mesh in (False, True)]
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor):
        net = copy.deepcopy(model)
        opt = kind(net.parameters(), lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        _step(net, opt)
        found.append(("torch", {"x.pt": _bytes({"optimizer": opt.state_dict()})}))
    adamw = _bytes(torch.optim.AdamW(model.parameters()).state_dict()["param_groups"][0])
    found.append(("torch", {"x.pt": _bitsandbytes()}))
    found += [("dcp", folder) for folder in _dcp(model)]
    group = torch.load(io.BytesIO(adamw), weights_only=True) | {"params": [0]}
    found += [("deepspeed", folder) for folder in (_deepspeed(group), _universal(group))]
    found.append(("safetensors", _safetensors()))
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "vocab_size": 32,
    }
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    found.append(("config", {"config.json": json.dumps(config).encode()}))
    built = {"model_type": "helium", "head_dim": 4, "num_hidden_layers": 2, "pad_token_id": 0}  # by transformers
    found.append(("config", {"config.json": json.dumps(config | built).encode()}))
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}}
    zero |= {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
    found.append(("launch", {"x.json": json.dumps(zero).encode()}))
    accelerate = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    found.append(("launch", {"x.yaml": accelerate.encode(), "ds.json": json.dumps(zero).encode()}))
    return found


def _step(net: Any, opt: Any) -> None:
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.step()


def _bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _read(folder: str) -> Folder:
    return {
        os.path.relpath(os.path.join(at, name), folder): open(os.path.join(at, name), "rb").read()
        for at, _, names in os.walk(folder)
        for name in names
    }


def _saved(net: Any, opt: Any) -> Folder:
    with tempfile.TemporaryDirectory() as folder:
        return _read(str(memopt.save(folder, model=net, optimizer=opt, extra={"a": (1, 2.5), "b": torch.ones(2)}).path))


def _of_ranks(model: Any, mesh: bool) -> Folder:
    """Of two ranks: rows of ``/zero1``, or the columns and replicas of a mesh. They are forked, and end unheard."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                try:
                    _rank(copy.deepcopy(model), rank, mesh, folder)
                    os._exit(0)
                finally:
                    os._exit(1)
            ranks.append(child)
        ends = [os.waitpid(child, 0)[1] for child in ranks]
        if any(ends):
            raise RuntimeError("two ranks could not save a checkpoint")
        return _read(next(entry.path for entry in os.scandir(folder) if entry.is_dir()))


def _rank(net: Any, rank: int, mesh: bool, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if mesh:
        from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

        def columns(_: str, module: Any, at: Any) -> None:
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(distribute_tensor(module.weight.detach(), at, [Shard(1)]))

        net = distribute_module(net, dist.init_device_mesh("cpu", (2,)), columns)
    opt = memopt.create(net, "adamw/zero3" if mesh else "adamw-8bit/zero1")
    _step(net, opt)
    memopt.save(folder, model=net, optimizer=opt)


def _bitsandbytes() -> bytes:
    state = {"step": 1}
    for i, signed in ((1, True), (2, False)):
        state |= {
            f"state{i}": torch.zeros(300, dtype=torch.uint8),
            f"absmax{i}": torch.ones(2),
            f"qmap{i}": code_book(signed),
        }
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    return _bytes({"state": {0: state}, "param_groups": [group]})


def _dcp(model: Any) -> list[Folder]:
    found = []
    for flat in (False, True):
        net = copy.deepcopy(model)
        opt = torch.optim.AdamW(net.parameters())
        _step(net, opt)
        state = get_optimizer_state_dict(net, opt, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "no_dist" in signature(dcp.save).parameters:
                dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
            else:  # torch 2.6
                dcp.save_state_dict({"optimizer": state}, dcp.FileSystemWriter(folder), no_dist=True)
            found.append(_read(folder))
    return found


def _deepspeed(group: dict[str, Any]) -> Folder:
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    content = {"partition_count": 1, "fp32_flat_groups": [torch.ones(4)]}
    content["optimizer_state_dict"] = {"state": {0: state}, "param_groups": [group]}
    model = {"param_shapes": [{"w": torch.Size([4])}], "module": {"w": torch.zeros(4)}}
    return {
        "latest": b"global_step1",
        "global_step1/mp_rank_00_model_states.pt": _bytes(model),
        "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt": _bytes({"optimizer_state_dict": content}),
    }


def _universal(group: dict[str, Any]) -> Folder:
    model = {"param_shapes": [{"w": torch.Size([4])}], "module": {"w": torch.zeros(4)}}
    folder = {
        f"global_step1/zero/w/{m}.pt": _bytes({"param": torch.ones(4)}) for m in ("fp32", "exp_avg", "exp_avg_sq")
    }
    return {
        **folder,
        "latest_universal": b"global_step1",
        "global_step1/zero/w/step.pt": _bytes(torch.tensor(1.0)),
        "global_step1/zero/optimizer_state.pt": _bytes(
            {"param_groups": [group], "optimizer_state_dict": {"state": {}}}
        ),
        "global_step1/mp_rank_00_model_states.pt": _bytes(model),
    }


def _safetensors() -> Folder:
    header = {"__metadata__": {"format": "pt"}}
    header |= {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate("ab")}
    text = json.dumps(header).encode()
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    return {
        "model.safetensors": len(text).to_bytes(8, "little") + text + bytes(16),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
