"""Chat templates: what usual ones need, and what hostile ones must not get."""

import json
import re

import pytest

from keras_kvcache.tokenizers import chat_template
from keras_kvcache.tokenizers.chat_template import render_chat_template

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": '1 < 2 & "yes"?'},
]


def render(template, messages=TURNS, **kwargs):
    return render_chat_template(template, messages, **kwargs)


def test_a_usual_template():
    template = (
        "{{ bos_token }}"
        "{% for message in messages %}\n"
        "    {% if message.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ '<' + message['role'] + '>' + message['content'] + eos_token }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    # A block's newline and indentation aren't part of the text.
    text = '<s><user>1 < 2 & "yes"?</s>\n'
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render(template, **tokens) == text + "<assistant>"
    assert render(template, add_generation_prompt=False, **tokens) == text


def test_json_is_not_escaped_for_html():
    assert render("{{ messages[1] | tojson }}") == (
        '{"role": "user", "content": "1 < 2 & \\"yes\\"?"}'
    )
    assert render("{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}") == (
        '{\n "a": 1,\n "b": "é"\n}'
    )


def test_the_helpers_templates_call():
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))
    assert render("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}") == "2"
    assert render("{% if tools %}tools{% else %}none{% endif %}") == "none"
    # A name nobody defined is false and empty, which templates rely on.
    assert render("{% if functions %}x{% endif %}{{ functions }}.") == "."


def test_a_template_may_refuse():
    with pytest.raises(ValueError, match="refuses the messages: No system role"):
        render("{{ raise_exception('No system role.') }}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ namespace.__init__.__globals__['os'].popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ dict.mro() }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{x.__class__}'.format_map({'x': ''}) }}",
        "{{ ('{0.__cla' ~ 'ss__}').format(messages) }}",
        "{{ [messages] | map(attribute='__class__') | list }}",
        "{{ messages | groupby('__class__') }}",
        "{% set f = '{0.__class__}'.format %}{{ f('') }}",
        "{% macro m() %}{% endmacro %}{{ m.__init__ }}",
        "{{ (messages | map('upper')).gi_frame }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='user') }}",
        "{{ messages.clear() }}",
    ],
)
def test_the_sandbox_holds(attack):
    turns = [dict(turn) for turn in TURNS]
    with pytest.raises(ValueError, match="tried to leave its sandbox"):
        render(attack, turns)
    assert turns == TURNS


@pytest.mark.parametrize("name", ["lipsum", "cycler", "joiner", "self.x", "request"])
def test_what_templates_do_not_need_is_not_there(name):
    with pytest.raises(ValueError, match="uses what isn't defined"):
        render("{{ " + name + ".anything }}")


def test_objects_are_not_handed_to_a_template():
    class Content(str):
        def launch(self):
            return "launched"

    turns = [{"role": "user", "content": Content("hi")}]
    with pytest.raises(ValueError, match="has no attribute 'launch'"):
        render("{{ messages[0].content.launch() }}", turns)
    with pytest.raises(TypeError, match="JSON"):
        render("", [{"role": "user", "content": "hi", "extra": object()}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "has a syntax error in line 1"),
        ("\n{{ 'a' ", "has a syntax error in line 2"),
        ("{% include 'x' %}", "failed: TypeError: no loader"),
        ("{{ messages[7].role }}", "uses what isn't defined"),
        ("{{ functions.name }}", "uses what isn't defined: 'functions'"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "failed: TypeError"),
        ("{% for i in range(1000000) %}{% endfor %}", "failed: OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed: RecursionError"),
    ],
)
def test_every_failure_is_a_value_error_with_its_reason(template, reason):
    with pytest.raises(ValueError, match=re.escape(f"The chat template {reason}")):
        render(template)


def test_lengths_are_limited(monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_TEMPLATE_LENGTH", 50)
    monkeypatch.setattr(chat_template, "_MAX_OUTPUT_LENGTH", 10)
    assert render("{{ 'a' * 10 }}") == "a" * 10
    with pytest.raises(ValueError, match="at most 10 characters"):
        render("{% for i in range(99999) %}a{% endfor %}")
    with pytest.raises(ValueError, match="at most 50 characters. Received: 51"):
        render("a" * 51)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hi",
        {"role": "user", "content": "hi"},
        ["hi"],
        [{"content": "hi"}],
        [{"role": 1, "content": "hi"}],
    ],
)
def test_messages_are_checked(messages):
    with pytest.raises(TypeError, match="`messages` must|every one of `messages`"):
        render("{{ 1 }}", messages)


def test_the_template_must_be_text():
    with pytest.raises(TypeError, match="`template` must be a string. Received: None"):
        render(None)


# As transformers renders them.

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"city": "Bonn"}}}
    ],
}
TALK = [
    {"role": "user", "content": "Weather? é<&'"},
    CALL,
    {"role": "tool", "name": "f", "content": "12", "tool_call_id": "x"},
    {"role": "assistant", "content": " Cold. ", "reasoning": "it is 12", "n": 1.5},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "x"}]}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
TEMPLATES = [
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.thinking %}<think>{{ m.reasoning_content }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ documents }}{{ flag }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}"
    "{% elif m.content %}{{ m.content[0].text }}{{ m.content | length }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.n }}{{ eos_token }}"
    "{% endgeneration %}{% endif %}\n{% endfor %}{{ sep_token }}{{ pad_token }}",
    "{% set c = joiner(', ') %}{% set y = cycler('a', 'b') %}"
    "{% for m in messages %}{{ c() }}{{ y.next() }}{{ m.content }}{% endfor %}",
]
TOKENS = dict(bos_token="<s>", eos_token="</s>", sep_token="<sep>", pad_token="<pad>")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", [TALK, PARTS, TALK[:2]])
@pytest.mark.parametrize(
    "options",
    [
        dict(add_generation_prompt=True, tools=TOOLS, flag=True, **TOKENS),
        dict(add_generation_prompt=False, documents=[{"text": "x"}], flag=(1, None)),
        dict(continue_final_message=True, **TOKENS),
        dict(continue_final_message="reasoning_content"),
    ],
)
def test_renders_as_transformers_does(template, messages, options):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    if not hasattr(utilities, "_alias_reasoning_fields"):
        # transformers before it knew the other names of what was thought.
        messages = [{k: v for k, v in m.items() if k != "reasoning"} for m in messages]
    # An absent BOS is empty here, as ever; there it's undefined, which writes nothing.
    try:
        texts, _ = utilities.render_jinja_template(
            [messages], chat_template=template, **options
        )
    except ValueError:
        with pytest.raises(ValueError, match="`continue_final_message` needs"):
            render(template, messages, **options)
        return
    assert render(template, messages, **options) == texts[0]


def test_what_is_given_is_left_as_it_was():
    before = json.dumps([TALK, PARTS])
    render(TEMPLATES[0], TALK, continue_final_message=True)
    render(TEMPLATES[0], PARTS, continue_final_message=True)
    assert json.dumps([TALK, PARTS]) == before


def test_tools_and_documents_are_checked():
    def add(a: int, b: int):
        return a + b

    with pytest.raises(TypeError, match="dictionaries, .*get_json_schema"):
        render("", tools=[add])
    with pytest.raises(TypeError, match="one of `documents` must be a dictionary"):
        render("", documents=["x"])
    with pytest.raises(TypeError, match="`tools` must be a list"):
        render("", tools="x")
    with pytest.raises(ValueError, match="exclude each other"):
        render("", add_generation_prompt=True, continue_final_message=True)
    loop = {"role": "user"}
    loop["content"] = [loop]
    with pytest.raises(ValueError, match="`messages` must not hold itself"):
        render("", [loop])
