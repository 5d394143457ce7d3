"""ChatTemplate: the field's idioms, refusals that name the place, and bounds that hold."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from unit.toy_tokenizers import CHAT_TEMPLATE, byte_level_bpe, write_model_dir

from baton.errors import ConfigError, InvalidRequest
from baton.text import template_sandbox
from baton.text.chat_template import ChatTemplate
from baton.text.template_sandbox import RenderLimitError
from baton.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]


def of(source: str, **kwargs: Any) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"}, **kwargs)


def refusal(template: ChatTemplate, messages: Any = USER, **kwargs: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages, **kwargs)
    assert caught.value.status == 400
    return caught.value


# ------------------------------------------------------------------ rendering


def test_chatml_from_a_model_directory(tmp_path):
    template = ChatTemplate.from_dir(write_model_dir(tmp_path, byte_level_bpe(300)))
    assert template.exists
    prompt = template.render(USER)
    assert prompt == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (
        template.render(USER, add_generation_prompt=False)
        == prompt[: -len("<|im_start|>assistant\n")]
    )
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[:2] == [0, 2]
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt


IDIOMS = {
    # trim_blocks and lstrip_blocks: block tags leave neither their line feed nor their indent.
    "blocks": ("{% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}",
        "3",
    ),
    "loop_controls": (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
        "{% if loop.last %}!{% endif %}{% endfor %}",
        "systemassistant!",
    ),
    "break": ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "system"),
    "filtered_loop": (
        "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.role }}{% endfor %}",
        "1user2assistant",
    ),
    "loop_else": ("{% for m in [] %}x{% else %}none{% endfor %}", "none"),
    "recursive_loop": (
        "{% for x in [1, [2, [3]]] recursive %}{% if x is number %}{{ x }}{% else %}"
        "({{ loop(x) }}){% endif %}{% endfor %}",
        "1(2(3))",
    ),
    "slices": ("{% for m in messages[1:] %}{{ m['content'] | trim }};{% endfor %}", "Grüß Gott;a;"),
    "reverse": ("{{ messages[::-1][0].role }}{{ (messages | last).role }}", "assistantassistant"),
    "tilde": ("{{ 'a' ~ 1 ~ none ~ messages[0].role }}", "a1Nonesystem"),
    "concatenation": ("{{ bos_token + messages[0]['content'] + eos_token }}", "<s>You are</s>"),
    "tojson": (
        "{{ {'b': 'ü<&', 'a': [1, none, true]} | tojson }}",
        '{"b": "ü<&", "a": [1, null, true]}',
    ),
    "tojson_indent": ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
    "macro": (
        "{% macro turn(m) %}[{{ m.role }}]{% endmacro %}{{ turn(messages[0]) }}",
        "[system]",
    ),
    "call_block": (
        "{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}x{% endcall %}",
        "<x>",
    ),
    "string_methods": (
        "{{ messages[1].content.strip().split(' ')[0].upper() }}"
        "{{ 'x</think>y'.split('</think>')[-1] }}",
        "GRÜSSy",
    ),
    "undefined_tests": (
        "{% if tools is defined and tools %}t{% endif %}{{ foo is defined }}",
        "False",
    ),
    "format": (
        "{{ '%s-%03d 1000000' % ('a', 7) }} {{ '%.1f' | format(2.25) }}",
        "a-007 1000000 2.2",
    ),
    "generation": ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "system"),
    "block_set": ("{% set x %}{{ messages[0].role }}!{% endset %}{{ x }}", "system!"),
    "items": ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
    "selectattr": ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
    "no_html_escape": ("{{ '<&>' }}", "<&>"),
    "arithmetic": (
        "{{ 2 ** 10 }} {{ 7 % 3 }} {{ 'ab' * 2 }} {{ [1] + [2] }}",
        "1024 1 abab [1, 2]",
    ),
}


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_of_the_field(name):
    source, expected = IDIOMS[name]
    messages = [
        {"role": "system", "content": "You are"},
        {"role": "user", "content": " Grüß Gott "},
        {"role": "assistant", "content": "a"},
    ]
    assert of(source).render(messages) == expected


def test_strftime_now():
    assert of("{{ strftime_now('%Y') }}").render(USER) == time.strftime("%Y")


def test_raise_exception_reaches_the_client():
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate') }}"
        "{% endif %}"
    )
    template = of(source)
    assert template.render(USER) == ""
    error = refusal(template, [{"role": "tool", "content": ""}])
    assert error.param == "messages"
    assert "Roles must alternate" in error.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 + messages[0].content }}",
        "{{ messages[7].content.x }}",
        "{{ 1 // (messages | length - 1) }}",
        "{{ messages[0].content | tojson(indent='x', separators=3) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].content() }}",
    ],
)
def test_templates_that_stumble_over_messages(source):
    error = refusal(of(source))
    assert error.param == "messages"
    assert "chat template" in error.message


def test_tools_choose_the_template_that_knows_them():
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"})
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[]) == "plain"
    assert template.render(USER, tools=[{"name": "f"}]) == "f"
    assert of("{{ tools[0].name }}").render(USER, tools=[{"name": "f"}]) == "f"


# ------------------------------------------------------------------ messages


def test_text_parts_are_joined_and_other_fields_stay():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": "N"}
    template = of("{{ messages[0].content }}|{{ messages[0].name }}")
    assert template.render([message]) == "a\nb|N"
    assert message["content"] is parts


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}, {"content": ""}])
def test_no_content_is_empty_text(content):
    assert of("[{{ messages[0].content }}]").render([{"role": "assistant", **content}]) == "[]"


OK = {"role": "user", "content": "x"}
TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["x"], "messages[0]"),
        ([OK, {"content": "x"}], "messages[1].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([OK, {"role": "user", "content": 5}], "messages[1].content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content"),
        ([{"role": "user", "content": [TEXT, "x"]}], "messages[0].content[1]"),
        (
            [OK, {"role": "user", "content": [TEXT, {"type": "image_url"}]}],
            "messages[1].content[1].type",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            "messages[0].content[0].text",
        ),
    ],
)
def test_malformed_messages_name_the_place(messages, param):
    error = refusal(of("never rendered"), messages)
    assert error.param == param
    assert param in error.message


def test_messages_are_data_and_never_template():
    content = "{{ 7 * 7 }}{% raw %}{# c #}"
    assert of("{{ messages[0].content }}").render([{"role": "user", "content": content}]) == content


# ------------------------------------------------------------------ files


def test_a_model_without_template_refuses_chat(tmp_path):
    write_model_dir(tmp_path, byte_level_bpe(300), {"chat_template": None})
    template = ChatTemplate.from_dir(tmp_path)
    assert not template.exists
    error = refusal(template)
    assert error.param == "messages"
    assert "no chat template" in error.message
    (tmp_path / "tokenizer_config.json").unlink()
    assert not ChatTemplate.from_dir(tmp_path).exists


def test_jinja_file_wins_over_the_config(tmp_path):
    write_model_dir(tmp_path, byte_level_bpe(300))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}ü", encoding="utf-8")
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "<s>ü"


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write_model_dir(tmp_path, byte_level_bpe(300), {"chat_template": named})
    template = ChatTemplate.from_dir(tmp_path)
    assert template.render(USER) == "d"
    assert template.render(USER, tools=[{}]) == "t"


def test_special_tokens_as_objects_and_extra(tmp_path):
    config = {
        "chat_template": "{{ eos_token }}{{ additional_special_tokens | join(',') }}",
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
    }
    write_model_dir(tmp_path, byte_level_bpe(300), config)
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "</s><a>,<b>"


@pytest.mark.parametrize(
    "field",
    [3, {}, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": "rag", "template": "x"}]],
)
def test_a_field_of_another_shape_names_the_file(tmp_path, field):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": field}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template"):
        ChatTemplate.from_dir(tmp_path)


def test_a_template_that_does_not_parse_names_file_and_line(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("a\n{% for %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja.*line 2"):
        ChatTemplate.from_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"cannot read .*chat_template\.jinja"):
        ChatTemplate.from_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ x | no_such_filter }}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        ChatTemplate.from_dir(tmp_path)


# ------------------------------------------------------------------ sandbox and bounds


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
    ],
)
def test_the_sandbox_holds(source):
    with contextlib.suppress(InvalidRequest):
        assert of(source).render(USER) == ""  # what is unsafe looks undefined


def test_files_cannot_be_included():
    refusal(of("{% include '/etc/passwd' %}"))
    refusal(of("{% import '/etc/passwd' as x %}"))


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"

BOMBS = {
    "silent_loops": NESTED.replace("BODY", ""),
    "loud_loops": NESTED.replace("BODY", "xxxxxxxxxxxxxxxxxxxx"),
    "filtered_loops": (
        "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}"
    ),
    "range": "{{ range(10 ** 9) | list }}",
    "macro_tree": (
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}"
        "{% endmacro %}{{ f(60) }}"
    ),
    "times": "{{ 'x' * 10 ** 10 }}",
    "times_list": "{{ 10 ** 10 * [1] }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "square": (
        "{% set ns = namespace(n=3) %}"
        "{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"
    ),
    "plus": (
        "{% set ns = namespace(s='x') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "plus_list": (
        "{% set ns = namespace(s=[1]) %}"
        "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "tilde": (
        "{% set ns = namespace(s='x') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "format": "{{ '%1000000000d' % 1 }}",
    "format_star": "{{ '%*d' % (1000000000, 1) }}",
    "format_precision": "{{ '%5.1000000000f' % 1 }}",
    "format_named": "{{ '%(x)-1000000000d' % {'x': 1} }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_defused(name, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 60.0)  # steps and sizes have to end them
    error = refusal(of(BOMBS[name]))
    assert error.param == "messages"
    # The bound must be what ended it, not an exhausted memory.
    assert isinstance(error.__cause__, OverflowError if name == "range" else RenderLimitError)
    if "loops" in name or name == "macro_tree":
        assert "steps" in error.message
    if "format" in name:
        assert "width" in error.message  # and not the length of what was already made


def test_loops_over_many_messages_are_bounded_too():
    quadratic = "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}"
    many = [{"role": "user", "content": ""}] * 2000
    assert of(quadratic).render(many[:400]) == ""
    assert "steps" in refusal(of(quadratic), many).message


def test_time_is_bounded_where_steps_are_slow(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.2)
    slow = "{% for a in range(99999) %}{{ (range(5000) | list | string | length) - 1 }}{% endfor %}"
    assert "0.2 s" in refusal(of(slow)).message


def test_output_is_bounded():
    template = of("{% for m in messages %}{{ m.content }}{% endfor %}", max_chars=10)
    assert template.render([{"role": "user", "content": "x" * 10}]) == "x" * 10
    assert "10 characters" in refusal(template, [{"role": "user", "content": "xxxxxx"}] * 2).message


def test_each_render_has_its_own_budget():
    template = of("{% for a in range(200) %}{% for b in range(1000) %}{% endfor %}{% endfor %}ok")
    outcomes: list[str] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(template.render(USER))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes += [template.render(USER), template.render(USER)]
    assert outcomes == ["ok"] * 4


def test_default_template_is_what_the_toys_say(tmp_path: Path):
    assert of(CHAT_TEMPLATE).render(USER).startswith("<s><|im_start|>user")
