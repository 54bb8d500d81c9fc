"""InternLM's chat formats, in Jinja.

CHAT is that of internlm-chat-7b and -8k, whose `<s>` before every finished round belongs to the text:
https://github.com/InternLM/InternLM, `build_inputs` of December 2023.  CHAT_V1_1 is the later one, without
`<eoh>`.  CHAT2 is InternLM2's.
"""

_ROUNDS = (
    "{{%- for message in messages -%}}"
    "{{%- if message.role == 'system' -%}}{before}{{{{ '<|System|>:' ~ message.content ~ '\\n' }}}}"
    "{{%- elif message.role == 'user' -%}}{before}{{{{ '<|User|>:' ~ message.content ~ '{after}\\n' }}}}"
    "{{%- elif message.role == 'assistant' -%}}"
    "{{{{ '<|Bot|>:' }}}}"
    "{{% generation %}}{{{{ message.content ~ '<eoa>' }}}}{{% endgeneration %}}{{{{ '\\n' }}}}"
    "{{%- else -%}}"
    "{{{{ raise_exception('InternLM knows the roles system, user and assistant, not ' ~ message.role) }}}}"
    "{{%- endif -%}}{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{ '<|Bot|>:' }}}}{{%- endif -%}}"
)

# the first message, and each of a user that another follows
_BOS = (
    "{%- set later = messages[loop.index :] | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- set earlier = messages[: loop.index0] | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- if loop.first or (earlier and later) -%}{{ '<s>' }}{%- endif -%}"
)

CHAT = _ROUNDS.format(before=_BOS, after="<eoh>")
CHAT_V1_1 = _ROUNDS.format(before="", after="")
CHAT2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEMPLATES = {"internlm-chat": CHAT, "internlm-chat-v1.1": CHAT_V1_1}
TEMPLATES2 = {"internlm2-chat": CHAT2}
