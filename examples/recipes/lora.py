"""LoRA with peft around any model: the base is frozen, and adapters with their own dropout are trained."""

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_rdrop import RDropMixin, dropout


class Adapted(RDropMixin, pl.LightningModule):
    def __init__(self, base, **kwargs):
        super().__init__(**kwargs)
        lora = LoraConfig(r=8, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
        self.network = get_peft_model(base, lora)
        dropout.switch_on(self.network)  # from_pretrained returns models in eval mode

    def forward(self, **inputs):
        return self.network(**inputs)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2)


if __name__ == "__main__":
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).eval()
    ids = torch.randint(20, (64, 8))
    rows = [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    module = Adapted(base, rdrop_alpha=1.0)
    pl.Trainer(max_epochs=5).fit(module, DataLoader(rows, 16, shuffle=True))
    module.network.save_pretrained("adapter")  # a few kilobytes, for PeftModel.from_pretrained(base, "adapter")
