"""A Hugging Face model on cumoe's experts: a tiny Mixtral with random weights, as nothing is downloaded here."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

folder = tempfile.TemporaryDirectory()
path = folder.name
config = MixtralConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)
MixtralForCausalLM(config).save_pretrained(path)
# BEGIN
import cumoe

cumoe.register_transformers()
model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="cumoe")
# END
ids = torch.randint(0, 99, (2, 7))
logits = model(ids).logits
model.set_experts_implementation("eager")
torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)
folder.cleanup()
