"""CausalLM, and the fused head of all language models."""

import pytest
import torch
from conftest import TOKEN_IDS, WORDS, texts, trained_on

from lightning_rdrop import RDropLoss
from lightning_rdrop.modules import CausalLM, Seq2Seq

transformers = pytest.importorskip("transformers")


def test_nan_in_validation_is_not_left_out(fit, gpt2):
    module, (good, bad) = CausalLM(gpt2), (texts(labels=False), texts(labels=False))
    module.measure = lambda *batch: None
    predict = module.rdrop_predict
    module.rdrop_predict = lambda inputs: (
        predict(inputs) + (torch.nan if not module.training and (inputs["input_ids"] == bad["input_ids"]).all() else 0)
    )
    bad["input_ids"] = bad["input_ids"].flip(0)
    assert trained_on(fit, module, good, bad)["val/ce"].isnan()


def test_causal_lm_is_shifted_as_hugging_faces(gpt2):
    module, batch = CausalLM(gpt2).eval(), texts(labels=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = module.network(**batch, labels=labels).loss
    for given in (batch, batch | {"labels": labels}):
        inputs, target = module.rdrop_unpack(given)
        torch.testing.assert_close(RDropLoss()(module.rdrop_predict(inputs)[None], target, 0.0).ce, expected)


def test_causal_lm_perplexity_is_exact_over_tokens(fit, gpt2):
    module = CausalLM(gpt2, learning_rate=0.0)
    long, short = texts(labels=False), {name: value[2:3, :3] for name, value in texts(labels=False).items()}
    metrics = trained_on(fit, module, long, short)
    module.eval()
    nll, tokens = 0.0, 0
    for batch in (long, short):
        inputs, target = module.rdrop_unpack(batch)
        average = module.rdrop_distance.to_target(module.rdrop_predict(inputs), target)
        nll, tokens = nll + average.total, tokens + average.weight
    torch.testing.assert_close(metrics["val/ce"], nll / tokens)
    torch.testing.assert_close(metrics["val/perplexity"], (nll / tokens).exp())
    assert metrics["train/kl"] > 0


@pytest.mark.parametrize(("task", "model"), [(CausalLM, "gpt2"), (Seq2Seq, "bart"), (Seq2Seq, "t5")])
def test_a_fused_head_changes_nothing_but_memory(fit, task, model, request):
    folder, batch = request.getfixturevalue(model), texts(labels=task is Seq2Seq)
    settings = {"scores": []} if task is Seq2Seq else {}
    plain, fused = task(folder, **settings), task(folder, fused_head=True, **settings)
    if model == "bart":  # its bias stands beside the output layer
        for module in (plain, fused):
            module.network.final_logits_bias.copy_(torch.arange(len(WORDS)) / 10)
    terms = []
    for module in (plain, fused):
        torch.manual_seed(1)
        terms.append(module.rdrop_step(batch))
        terms[-1].loss.backward()
    assert terms[0].kl > 0
    assert terms[1].prediction is None
    for name in ("loss", "ce", "kl", "rows"):
        torch.testing.assert_close(getattr(terms[1], name), getattr(terms[0], name))
    gradients = [{name: value.grad for name, value in module.network.named_parameters()} for module in (plain, fused)]
    torch.testing.assert_close(gradients[1], gradients[0])
    inputs = fused.rdrop_unpack(batch)[0]
    torch.testing.assert_close(fused.eval().rdrop_predict(inputs), plain.eval().rdrop_predict(inputs))
    assert trained_on(fit, fused.train(), batch)["val/ce"] > 0


def test_a_fused_head_makes_no_logits(gpt2):
    module = CausalLM(gpt2, fused_head=True)
    module.network.lm_head.register_forward_hook(lambda *_: pytest.fail("made logits"))
    assert module.rdrop_step(texts(labels=False)).loss > 0


def test_a_head_that_is_more_than_linear_is_not_fused(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    settings = transformers.Gemma2Config(
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.01, **sizes, **TOKEN_IDS
    )
    capped = folder(transformers.Gemma2ForCausalLM(settings))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes them further"):
        CausalLM(capped, fused_head=True)
    assert CausalLM(capped).rdrop_head() is None


def test_a_fused_head_is_looked_up_in_each_step(gpt2):
    """An adapter put on the output layer later is refused, and a copy of it that peft trains is taken."""
    peft = pytest.importorskip("peft")
    module, batch = CausalLM(gpt2, fused_head=True), texts(labels=False)

    def adapted(**config):
        base = transformers.AutoModelForCausalLM.from_pretrained(gpt2).train()
        module.network = peft.get_peft_model(base, peft.LoraConfig(fan_in_fan_out=True, **config))
        return module.rdrop_step(batch)

    with pytest.raises(ValueError, match=r"without its adapter, Linear, .*target_modules"):
        adapted(target_modules=["lm_head"])
    adapted(target_modules=["c_attn"], modules_to_save=["lm_head"]).loss.backward()
    (copied,) = module.network.get_output_embeddings().modules_to_save.values()
    assert copied.weight.grad.abs().sum() > 0
    adapted(target_modules=["c_attn"]).loss.backward()
    grads = [p.grad.abs().sum() for name, p in module.network.named_parameters() if "lora_B" in name]
    assert all(grad > 0 for grad in grads)


def test_padding_of_unlabelled_texts_does_not_count(gpt2):
    module, batch = CausalLM(gpt2), texts(labels=False)
    assert (batch["attention_mask"] == 0).any()
    terms = []
    for padding in (0, 1):
        changed = batch["input_ids"].where(batch["attention_mask"] == 1, padding)
        torch.manual_seed(1)
        terms.append(module.rdrop_step({"labeled": batch, "unlabeled": batch | {"input_ids": changed}}))
    assert terms[0].extra["kl_unlabeled"] > 0
    torch.testing.assert_close(terms[0].extra["kl_unlabeled"], terms[1].extra["kl_unlabeled"])


def test_a_mixture_of_experts_is_balanced_as_hugging_faces(folder):
    settings = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5, attn_implementation="eager",
        **TOKEN_IDS,
    )  # fmt: skip
    path, batch = folder(transformers.MixtralForCausalLM(settings)), texts(labels=False)
    module = CausalLM(path, rdrop_views=1, rdrop_guard="off")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = module.network(**batch, labels=labels)
    terms = module.rdrop_step(batch)
    torch.testing.assert_close(terms.loss, expected.loss)
    torch.testing.assert_close(terms.extra["balance"], 0.5 * expected.aux_loss)
    with pytest.raises(ValueError, match=r"fused_head=True never completes.*load-balancing loss"):
        CausalLM(path, fused_head=True)
