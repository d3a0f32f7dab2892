"""Masked language modeling: cross-entropy of the masked tokens, consistency of all tokens except padding."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from lightning_rdrop import Categorical, MaskedConsistency, RDropMixin


class MaskedLM(RDropMixin, pl.LightningModule):
    def __init__(self, **sizes):
        super().__init__(rdrop_distance=MaskedConsistency(Categorical()))
        self.network = BertForMaskedLM(BertConfig(**sizes)).train()

    def forward(self, **inputs):
        return self.network(**inputs)

    def rdrop_unpack(self, batch):  # unmasked tokens have no label but count for kl; padding counts for neither
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return inputs, (batch["labels"], batch["attention_mask"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def masked(texts):  # a short version of transformers' DataCollatorForLanguageModeling
    ids = torch.stack(texts)
    chosen = (torch.rand(ids.shape) < 0.15) & (ids != 0)
    labels = ids.where(chosen, -100)
    return {"input_ids": ids.masked_fill(chosen, 1), "attention_mask": (ids != 0).long(), "labels": labels}


if __name__ == "__main__":
    texts = [torch.arange(2, 18).where(torch.arange(16) < torch.randint(8, 17, ()), 0) for _ in range(64)]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    trainer = pl.Trainer(max_epochs=5)
    trainer.fit(MaskedLM(vocab_size=50, **sizes), DataLoader(texts, 16, shuffle=True, collate_fn=masked))
