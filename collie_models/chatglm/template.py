"""The chat formats of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, in Jinja.

CHAT: https://github.com/THUDM/ChatGLM-6B, `chat` of modeling_chatglm.py: a lone question is its own prompt.
CHAT2: https://github.com/THUDM/ChatGLM2-6B, `build_prompt`.  CHAT3: https://github.com/THUDM/ChatGLM3,
PROMPT.md; the line after a role is its metadata, and the space stands for the dummy prefix of the content.
What the first two have no role for, a system message, goes in front as text.
"""

_UNKNOWN = "{{ raise_exception('the chat format knows no role ' ~ message.role) }}"

CHAT = (
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content ~ '\n' }}"
    "{%- elif message.role == 'user' and users | length == 1 -%}{{ message.content }}"
    "{%- elif message.role == 'user' -%}"
    "{%- set earlier = messages[: loop.index0] | selectattr('role', 'equalto', 'user') | list -%}"
    "{{ '[Round ' ~ earlier | length ~ ']\n问：' ~ message.content ~ '\n答：' }}"
    "{%- elif message.role == 'assistant' -%}"
    "{% generation %}{{ message.content }}{% endgeneration %}{{ '\n' if not loop.last }}"
    "{%- else -%}" + _UNKNOWN + "{%- endif -%}{%- endfor -%}"
)
CHAT2 = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content ~ '\n\n' }}"
    "{%- elif message.role == 'user' -%}"
    "{%- set earlier = messages[: loop.index0] | selectattr('role', 'equalto', 'user') | list -%}"
    "{{ '[Round ' ~ (earlier | length + 1) ~ ']\n\n问：' ~ message.content ~ '\n\n答：' }}"
    "{%- elif message.role == 'assistant' -%}"
    "{% generation %}{{ message.content }}{% endgeneration %}{{ '\n\n' if not loop.last }}"
    "{%- else -%}" + _UNKNOWN + "{%- endif -%}{%- endfor -%}"
)
CHAT3 = (
    "{%- for message in messages -%}"
    "{%- set role = 'observation' if message.role == 'tool' else message.role -%}"
    "{{ '<|' ~ role ~ '|>' }}"
    "{%- set words = (message.metadata or '') ~ '\n ' ~ message.content -%}"
    "{%- if role == 'assistant' -%}{% generation %}{{ words }}{% endgeneration %}"
    "{%- elif role in ('system', 'user', 'observation') -%}{{ words }}"
    "{%- else -%}" + _UNKNOWN + "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)

TEMPLATES = {"chatglm": CHAT}
TEMPLATES2 = {"chatglm2": CHAT2}
TEMPLATES3 = {"chatglm3": CHAT3}
