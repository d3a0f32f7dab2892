"""R-Drop in the Hugging Face Trainer: python -m examples.hugging_face_trainer"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lightning_rdrop import RDropLoss, views


class RDropTrainer(Trainer):
    """Double the batch before the model, and treat the two halves of its output as the views."""

    def __init__(self, *args, alpha=4.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha, self.loss = alpha, RDropLoss()
        # The loss is a mean over the rows of a micro-batch, so the Trainer must divide it by the number of
        # micro-batches. It skips that for models that accept num_items_in_batch; with four micro-batches, the logged
        # loss and the gradient would be four times too large.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # evaluation: one pass with dropout off
            return super().compute_loss(model, inputs, return_outputs)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        output = model(**views.duplicate(inputs, 2))
        terms = self.loss(views.split(output.logits, 2, len(labels)), labels, self.alpha)
        return (terms.loss, output) if return_outputs else terms.loss


def train(folder, accumulate=1, alpha=4.0):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes))
    rows = [{"input_ids": row, "labels": row[0] % 3} for row in torch.randint(20, (64, 8))]
    arguments = TrainingArguments(
        folder, num_train_epochs=4, per_device_train_batch_size=16 // accumulate, learning_rate=2e-3, logging_steps=1,
        gradient_accumulation_steps=accumulate, report_to="none", save_strategy="no", eval_strategy="epoch",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = RDropTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, alpha=alpha)
    trainer.train()
    return trainer


if __name__ == "__main__":
    train("trainer")
