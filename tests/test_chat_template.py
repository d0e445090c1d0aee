"""Chat templates: what usual ones need, and what hostile ones must not get."""

import re

import pytest

from keras_kvcache.loaders import chat_template
from keras_kvcache.loaders.chat_template import render_chat_template

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
    with pytest.raises(ValueError, match="at most 50 characters; it has 51"):
        render("a" * 51)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hi",
        {"role": "user", "content": "hi"},
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "hi"}],
    ],
)
def test_messages_are_checked(messages):
    with pytest.raises(TypeError, match="`messages` must|every one of `messages`"):
        render("{{ 1 }}", messages)


def test_the_template_must_be_text():
    with pytest.raises(TypeError, match="`template` must be a string; got None"):
        render(None)
