"""The Trainer of Hugging Face Transformers with compressed gradients: a callback that registers the hook.

torchrun --nproc-per-node 2 examples/with_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import hvd_sketch

STEPS = 40


class Sketched(TrainerCallback):
    """Registers the hook when the model is wrapped and the optimizer is there."""

    trainer: Trainer

    def __init__(self, compression: Any) -> None:
        self.compression = compression

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Called once."""
        self.state = hvd_sketch.ddp.register(self.trainer.model_wrapped, self.trainer.optimizer, self.compression)


def main() -> None:
    """Train a tiny BERT to tell which of two words comes more often, and tell what it took."""
    torch.manual_seed(0)
    words = torch.randint(2, (64 * STEPS, 15))
    labels = (words.sum(1) > 7).long()
    data = [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=16))
    sketched = Sketched(hvd_sketch.Compression.sharded(ratio=10, warmup_steps=0))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=1e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[sketched])
        sketched.trainer = trainer
        outcome = trainer.train()
    stats = sketched.state.exchange.stats
    if trainer.is_world_process_zero():
        print(f"loss {outcome.training_loss:.4f} after {stats.steps} steps, {stats.ratio:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
