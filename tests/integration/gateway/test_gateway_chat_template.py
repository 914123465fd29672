"""Chat templates render as the transformers library renders them."""

from pathlib import Path

import pytest

from services.gateway.chat_template import ChatTemplate
from tests.unit.gateway.model_files import write_model

_TURNS = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": "<b>\"Hé\" & 'you'</b>"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": ""},
]
_TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n[U]{{ m.content }}\n    {% else %}\n"
    "[O]{{ m['content'] | trim }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}[A]{% endif %}",
    "{% for m in messages %}{{ m | tojson }}{{ loop.index0 }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}{% if tools %}T{% endif %}{{ unk_token is defined }}",
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
]


@pytest.mark.parametrize("source", _TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(tmp_path: Path, source: str, prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    write_model(tmp_path)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    expected = reference.apply_chat_template(_TURNS, chat_template=source, tokenize=False, add_generation_prompt=prompt)
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(_TURNS, add_generation_prompt=prompt) == expected
