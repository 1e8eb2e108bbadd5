"""Llama and the models that share its architecture (SmolLM2, TinyLlama, Llama 1 to 3)."""

from jax_sae.backbones.llama.modeling import Llama as Llama
from jax_sae.backbones.llama.modeling import LlamaConfig as LlamaConfig
from jax_sae.backbones.llama.params import load_gguf as load_gguf
from jax_sae.backbones.llama.params import load_huggingface as load_huggingface
from jax_sae.backbones.llama.params import load_llama as load_llama
from jax_sae.backbones.llama.tokenizer import load_tokenizer as load_tokenizer
