"""The public scripts of ``benchmarks/scripts.py``: where each comes from, its lines that change, how it is run."""

from __future__ import annotations

from typing import NamedTuple

CLM = (
    "--model_name_or_path tiny-gpt2 --train_file text.txt --validation_file text.txt --block_size 24 "
    "--per_device_train_batch_size 8 --learning_rate 3e-3 --output_dir out"
)
TRAINER = "--num_train_epochs 1 --save_steps 10 --use_cpu --report_to none --seed 1"
IN_TRAINER = (
    '        optimizer_cls_and_kwargs=(memopt.Optimizer, {{"spec": "{spec}", "lr": training_args.learning_rate}}),'
)


class Change(NamedTuple):
    """``line`` of ``file``, which is there once, becomes ``lines``; ``{spec}`` is the spec."""

    file: str
    line: str
    lines: tuple[str, ...]


class Script(NamedTuple):
    """``file`` of FOLDER, with ``beside`` it; ``resume`` are the further arguments of a second run in the folder that
    the first leaves, whose losses are the first's last ones if ``tail``."""

    name: str
    source: str
    file: str
    changes: tuple[Change, ...]
    arguments: str
    resume: str = ""
    tail: bool = True
    specs: tuple[str, ...] = ("adamw", "adamw-8bit")
    beside: tuple[str, ...] = ()
    ranks: int = 1
    environment: tuple[tuple[str, str], ...] = ()


def imported(file: str) -> Change:
    return Change(file, "import torch", ("import memopt", "import torch"))


NLP = (
    "from torch.optim import AdamW",
    "    optimizer = AdamW(params=model.parameters(), lr=lr)",
    '    optimizer = memopt.create(model, "{spec}", lr=lr)',
)
SCRIPTS = (
    Script(
        "accelerate's nlp_example",
        "sarvex/accelerate examples/nlp_example.py, 514db1cfecddb89e497d4a3933da6038ab3c3569",
        "nlp_example.py",
        (Change("nlp_example.py", NLP[0], ("import memopt",)), Change("nlp_example.py", NLP[1], (NLP[2],))),
        "--cpu",
    ),
    Script(
        "accelerate's complete_nlp_example",
        "huggingface/accelerate examples/complete_nlp_example.py, 62357f218f72cce88b8e086cc372b15c119b590b",
        "complete_nlp_example.py",
        (
            Change("complete_nlp_example.py", NLP[0], ("import memopt",)),
            Change("complete_nlp_example.py", NLP[1], (NLP[2],)),
        ),
        "--cpu --checkpointing_steps epoch --output_dir out",
        "--resume_from_checkpoint out/epoch_1",
    ),
    Script(
        "transformers' run_clm",
        "huggingface/transformers examples/pytorch/language-modeling/run_clm.py, "
        "0851a87dd4a49f695c1c0063d2b9d5bd2c844689",
        "run_clm.py",
        (
            imported("run_clm.py"),
            Change(
                "run_clm.py",
                "        processing_class=tokenizer,",
                ("        processing_class=tokenizer,", IN_TRAINER),
            ),
        ),
        f"{CLM} {TRAINER} --do_train --do_eval",
        "--resume_from_checkpoint out/checkpoint-20",
    ),
    Script(
        "transformers' run_clm_no_trainer",
        "apt-team-018/transformers-usf examples/pytorch/language-modeling/run_clm_no_trainer.py, "
        "685666397483bacaea9b2cf00d820502fb9fa75c",
        "run_clm_no_trainer.py",
        (
            imported("run_clm_no_trainer.py"),
            Change(
                "run_clm_no_trainer.py",
                "    optimizer = torch.optim.AdamW(optimizer_grouped_parameters, lr=args.learning_rate)",
                ('    optimizer = memopt.create(optimizer_grouped_parameters, "{spec}", lr=args.learning_rate)',),
            ),
        ),
        f"{CLM} --num_train_epochs 2 --checkpointing_steps epoch --seed 1",
        "--resume_from_checkpoint out/epoch_0",
    ),
    Script(
        "PEFT's LoRA",
        "huggingface/peft examples/conditional_generation/peft_lora_seq2seq_accelerate_fsdp.py, "
        "00dc6f4a16c5933c6e4342b1c322e88694bc1bc0",
        "peft_lora_seq2seq_accelerate_fsdp.py",
        (
            imported("peft_lora_seq2seq_accelerate_fsdp.py"),
            Change(
                "peft_lora_seq2seq_accelerate_fsdp.py",
                "    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)",
                ('    optimizer = memopt.create(model, "{spec}", lr=lr)',),
            ),
        ),
        "",
    ),
    Script(
        "TRL's sft, --use_peft",
        "the installed trl/scripts/sft.py",
        "sft.py",
        (
            Change("sft.py", "import argparse", ("import argparse", "import memopt")),
            Change(
                "sft.py",
                "        peft_config=get_peft_config(model_args),",
                ("        peft_config=get_peft_config(model_args),", IN_TRAINER),
            ),
        ),
        "--model_name_or_path tiny-gpt2 --dataset_name sft --use_peft --lora_r 32 --max_length 32 --bf16 False "
        "--per_device_train_batch_size 8 --learning_rate 1e-2 --num_train_epochs 3 --save_steps 16 --logging_steps 8 "
        "--use_cpu --report_to none --seed 1 --output_dir out",
        "--resume_from_checkpoint out/checkpoint-16",
    ),
    Script(
        "a ZeRO-2 offload file, under run_clm",
        "hiyouga/LLaMA-Factory examples/deepspeed/ds_z2_offload_config.json, 1d6e8b218240c154638f9bdcb76a1a089c27891b",
        "run_clm.py",
        (
            Change(
                "ds_z2_offload_config.json",
                '  "zero_allow_untested_optimizer": true,',
                ('  "zero_allow_untested_optimizer": true,', '  "zero_force_ds_cpu_optimizer": false,'),
            ),
        ),
        f"{CLM} {TRAINER} --do_train --deepspeed ds_z2_offload_config.json --ddp_backend gloo",
        "--resume_from_checkpoint out/checkpoint-10",
        beside=("ds_z2_offload_config.json",),
        ranks=2,
        environment=(("DS_ACCELERATOR", "cpu"),),
    ),
    Script(
        "Lightning's transformer",
        "Lightning-AI/pytorch-lightning examples/pytorch/basics/transformer.py, "
        "a9ca6b1bb4d1150088290a4529ba1b6c6d5c5965",
        "transformer.py",
        (
            imported("transformer.py"),
            Change(
                "transformer.py",
                "        return torch.optim.SGD(self.parameters(), lr=0.1)",
                ('        return memopt.create(self, "{spec}", lr=0.1)',),
            ),
        ),
        "",
        specs=("sgd",),
        environment=(
            ("LIGHTNING", "1"),
            ("PL_TRAINER_ACCELERATOR", "cpu"),
            ("PL_TRAINER_LIMIT_VAL_BATCHES", "1"),
            ("PL_TRAINER_LIMIT_TEST_BATCHES", "1"),
        ),
    ),
    Script(
        "nanoGPT",
        "karpathy/nanoGPT train.py, e2221318e607eb5ee0669d6b7641af25a2111545; model.py, "
        "04a1d697ddc57aadb2edbe95816bf86c6b8918b0; configurator.py, 085bba526a18b1031cee40d8f10199f5f0b7c9a3",
        "nanoGPT/train.py",
        (
            Change("nanoGPT/model.py", "import torch", ("import memopt", "import torch")),
            Change(
                "nanoGPT/model.py",
                "        optimizer = torch.optim.AdamW(optim_groups, lr=learning_rate, betas=betas, **extra_args)",
                ('        optimizer = memopt.create(optim_groups, "{spec}", lr=learning_rate, betas=betas)',),
            ),
        ),
        "--device=cpu --dtype=float32 --compile=False --wandb_log=False --dataset=words --block_size=24 --batch_size=8 "
        "--gradient_accumulation_steps=2 --n_layer=1 --n_head=2 --n_embd=64 --eval_interval=10 --eval_iters=2 "
        "--warmup_iters=5 --lr_decay_iters=100 --learning_rate=3e-3 --max_iters=20",
        "--init_from=resume --max_iters=30",
        tail=False,
        beside=("nanoGPT/model.py", "nanoGPT/configurator.py"),
    ),
)
