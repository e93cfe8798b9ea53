"""What was published, as data. ``source`` is where each figure stands; what the source does not say is in ``notes``,
with what stands here instead. Steps are those of the published batch.
"""

from __future__ import annotations

from typing import Any

_LLAMA_2 = {
    "spec": "adamw",
    "hyper": {"betas": (0.9, 0.95), "eps": 1e-5},
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "kind": "cosine",
    "warmup": 2_000,
    "total_steps": 500_000,
    "floor": 0.1,
    "batch": "4M tokens",
    "source": "Touvron et al. 2023, Llama 2: Open Foundation and Fine-Tuned Chat Models, section 2.2 and table 1",
    "notes": "steps: 2.0T tokens at 4M; which parameters decay is not stated",
}
_LLAMA_3 = {
    "spec": "adamw",
    "hyper": {"betas": (0.9, 0.95), "eps": 1e-5},
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "kind": "cosine",
    "warmup": 8_000,
    "total_steps": 1_200_000,
    "floor": 0.01,
    "batch": "4M tokens, 8M after 252M tokens, 16M after 2.87T tokens",
    "source": "Dubey et al. 2024, The Llama 3 Herd of Models, section 3.4.1 and table 3",
    "notes": "betas, eps, decay and clipping are not stated; these are Llama 2's. Warm-up, steps, floor (8e-7) and "
    "batch are stated of 405B, 8B and 70B having 'similar recipes'",
}
_T5 = {
    # Adafactor's own defaults: beta2 = 1 - t^-0.8, updates clipped to an RMS of 1, steps relative to the parameter's.
    "spec": "adafactor",
    "hyper": {"convention": "transformers", "relative_step": False, "scale_parameter": True},
    "weight_decay": 0.0,
    "clip_norm": None,
    "batch": "128 sequences of 512 tokens",
}
_QLORA = {
    "spec": "adamw@paged",
    "hyper": {"betas": (0.9, 0.999), "eps": 1e-8},
    "weight_decay": 0.0,
    "clip_norm": 0.3,
    "kind": "constant",
    "batch": "16 sequences",
    "decays": "all",
    "source": "Dettmers et al. 2023, QLoRA, appendix B.2 and table 9; its script qlora.py",
    "notes": "adapters of rank 64, alpha 16 on all linear layers; beta1 and eps are the defaults of the script's "
    "optimizer. The script's warm-up of 3 % does nothing with its constant schedule",
}

#: Updates of matrices as large as AdamW's, so that one rate is for all.
_MUON = {
    "spec": "muon(adamw)",
    "hyper": {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 5},
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-3-175b": {
        "summary": "pre-training of GPT-3 175B",
        "spec": "adamw",
        "lr": 0.6e-4,
        "hyper": {"betas": (0.9, 0.95), "eps": 1e-8},
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "kind": "cosine",
        "warmup": 117,
        "total_steps": 81_250,
        "floor": 0.1,
        "batch": "3.2M tokens, rising from 32k over the first 4 to 12 billion",
        "source": "Brown et al. 2020, Language Models are Few-Shot Learners, table 2.1 and appendix B",
        "notes": "published in tokens: warm-up 375M, cosine over 260B (then 10 % of the rate to 300B), here in steps "
        "of the full batch; which parameters decay is not stated",
    },
    "moonlight": {
        "summary": "pre-training of Moonlight 16B-A3B with Muon",
        "lr": 4.2e-4,
        "kind": "cosine",
        "warmup": 2_000,
        "total_steps": 161_000,
        "floor": 0.1,
        "batch": "2048 sequences of 8192 tokens, 4096 after 200B tokens",
        "source": "Liu et al. 2025, Muon is Scalable for LLM Training, sections 2.2 and 3.3",
        **_MUON,
        "notes": "published in tokens: a rise to 33B, then a cosine to 5.2T, here in steps of both batches; then 500B "
        "more, up to 1e-4 in 100 steps and in a line to 0. Which parameters decay is not stated, and clipping is not: "
        "these are the usual ones",
    },
    "kimi-k2": {
        "summary": "pre-training of Kimi K2 with MuonClip, of which this is the Muon",
        "lr": 2e-4,
        "kind": "wsd",
        "warmup": 500,
        "total_steps": 231_000,
        "floor": 0.1,
        "schedule": {"decay": 0.355},
        "batch": "67M tokens, sequences of 4096",
        "source": "Kimi Team 2025, Kimi K2: Open Agentic Intelligence, section 2.5 and algorithm 1",
        **_MUON,
        "notes": "published in tokens: 10T at the peak, 5.5T down to 2e-5, there in a cosine and here in a line; "
        "QK-Clip (attention logits above 100 scale the query and key weights) is the model's and not here; momentum "
        "(here Moonlight's), which rule steps the rest, and clipping of gradients are not stated",
    },
    "glm-4.5": {
        "summary": "pre-training of GLM-4.5 with Muon",
        "lr": 2.5e-4,
        "kind": "cosine",
        "warmup": 2_000,
        "total_steps": 364_000,
        "floor": 0.1,
        "batch": "16M tokens, rising to 64M over the first 500B",
        "source": "GLM-4.5 Team 2025, GLM-4.5: Agentic, Reasoning, and Coding Foundation Models, section 2.4",
        **_MUON,
        "notes": "published in tokens, to the end of mid-training (23T in all); the length of the warm-up (here "
        "Moonlight's) and clipping are not stated. There Muon steps all but embeddings, biases and norms: the output "
        "head and gates too, as overrides={'lm_head.*': 'muon', '*.gate.*': 'muon'} says",
    },
    "llama-2-7b": {"summary": "pre-training of Llama 2 7B", "lr": 3e-4, **_LLAMA_2},
    "llama-2-13b": {"summary": "pre-training of Llama 2 13B", "lr": 3e-4, **_LLAMA_2},
    "llama-2-34b": {"summary": "pre-training of Llama 2 34B", "lr": 1.5e-4, **_LLAMA_2},
    "llama-2-70b": {"summary": "pre-training of Llama 2 70B", "lr": 1.5e-4, **_LLAMA_2},
    "llama-3-8b": {"summary": "pre-training of Llama 3 8B", "lr": 3e-4, **_LLAMA_3},
    "llama-3-70b": {"summary": "pre-training of Llama 3 70B", "lr": 1.5e-4, **_LLAMA_3},
    "llama-3-405b": {"summary": "pre-training of Llama 3 405B", "lr": 8e-5, **_LLAMA_3},
    "chinchilla-70b": {
        "summary": "pre-training of Chinchilla 70B",
        "spec": "adamw",
        "lr": 1e-4,
        "hyper": {"betas": (0.9, 0.95), "eps": 1e-8},
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "kind": "cosine",
        "warmup": 1_500,
        "total_steps": 466_667,
        "floor": 0.1,
        "batch": "1.5M tokens, 3M from midway on",
        "source": "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, section 4.1 and table 4",
        "notes": "stated: AdamW, the peak, a cosine to a tenth over all 1.4T tokens, the batch. Steps are of 3M "
        "tokens; warm-up and clipping are Gopher's (Rae et al. 2021); betas, eps and decay are not stated and "
        "here GPT-3's",
    },
    "palm-540b": {
        "summary": "pre-training of PaLM 540B: Adafactor's rule without factoring",
        "spec": "adafactor-32bit",
        "lr": 1e-2,
        "hyper": {"beta1": 0.9, "beta2_decay": -0.8, "d": 1.0, "convention": "torch"},
        # Decay starts as the rate and follows it: weights shrink by lr² a step.
        "weight_decay": 1e-2,
        "schedule": {"hold": 10_000, "decay_with_rate": True},
        "clip_norm": 1.0,
        "kind": "inverse_sqrt",
        "total_steps": 255_000,
        "batch": "1M tokens, 2M from step 50k, 4M from step 115k on",
        "source": "Chowdhery et al. 2022, PaLM: Scaling Language Modeling with Pathways, section 5",
        "notes": "lr 0.01 for 10,000 steps, then 1/sqrt(k); beta2 = 1 - k^-0.8; dynamic decay lr². The RMS at which "
        "Adafactor clips updates, and which parameters decay, are not stated",
    },
    "t5": {
        "summary": "pre-training of T5",
        "lr": 1e-2,
        "kind": "inverse_sqrt",
        "schedule": {"hold": 10_000},
        "total_steps": 524_288,
        **_T5,
        "source": "Raffel et al. 2020, Exploring the Limits of Transfer Learning, section 3.1.2",
        "notes": "1/sqrt(max(k, 10^4)), 2^19 steps; 'AdaFactor' without its settings, here Adafactor's published "
        "defaults (Shazeer & Stern 2018)",
    },
    "t5-finetune": {
        "summary": "fine-tuning of T5",
        "lr": 1e-3,
        "kind": "constant",
        **_T5,
        "source": "Raffel et al. 2020, Exploring the Limits of Transfer Learning, section 3.1.2",
        "notes": "2^18 steps at a constant rate; 'AdaFactor' without its settings, here Adafactor's published defaults",
    },
    "gpt-2-finetune": {
        "summary": "fine-tuning of GPT-2 as transformers' run_clm example does",
        "spec": "adamw",
        "lr": 5e-5,
        "hyper": {"betas": (0.9, 0.999), "eps": 1e-8},
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "kind": "linear",
        "batch": "8 sequences per device, 3 epochs",
        "source": "defaults of transformers' TrainingArguments, with which its example run_clm.py fine-tunes GPT-2",
        "notes": "Radford et al. 2019 do not fine-tune GPT-2 and state no values",
    },
    "bert-finetune": {
        "summary": "fine-tuning of BERT",
        "spec": "adamw",
        "lr": 3e-5,
        "hyper": {"betas": (0.9, 0.999), "eps": 1e-6},
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "kind": "linear",
        "warmup": 0.1,
        "decays": "weights",
        "batch": "16 or 32 sequences, 2 to 4 epochs",
        "source": "Devlin et al. 2019, BERT, appendix A.3; its scripts run_classifier.py and optimization.py",
        "notes": "the rate is chosen among 5e-5, 3e-5 and 2e-5 on the development set; warm-up, eps, clipping and what "
        "decays are the script's, whose Adam has no bias correction",
    },
    "prodigy-diffusion": {
        "summary": "fine-tuning of diffusion models with Prodigy, which finds the rate",
        "spec": "prodigy",
        "lr": 1.0,
        "hyper": {"use_bias_correction": True, "safeguard_warmup": True},
        "weight_decay": 0.01,
        "clip_norm": None,
        "kind": "cosine",
        "decays": "all",
        "source": "Mishchenko & Defazio 2024; the README of its package prodigyopt 1.1.2",
        "notes": "in 8 bits as spec='prodigy-8bit'. Betas of (0.9, 0.99) sometimes help, and d0 of 1e-5 or 1e-4 where "
        "d stays too small; steps, batch and clipping are not stated",
    },
    "lora": {
        "summary": "LoRA fine-tuning of GPT-2 medium (E2E)",
        "spec": "adamw",
        "lr": 2e-4,
        "hyper": {"betas": (0.9, 0.999), "eps": 1e-6},
        "weight_decay": 0.01,
        "clip_norm": None,
        "kind": "linear",
        "warmup": 500,
        "total_steps": 26_289,
        "decays": "all",
        "batch": "8 sequences, 5 epochs",
        "source": "Hu et al. 2021, LoRA, table 11; its examples/NLG (README and src/optimizer.py)",
        "notes": "adapters of rank 4, alpha 32; betas, eps, no clipping and the steps are the example's",
    },
    "qlora": {"summary": "QLoRA fine-tuning of LLaMA 7B and 13B", "lr": 2e-4, **_QLORA},
    "qlora-65b": {"summary": "QLoRA fine-tuning of LLaMA 33B and 65B", "lr": 1e-4, **_QLORA},
}
