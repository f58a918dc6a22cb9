//! Chat templates that a recipe can name, in Jinja: the formats that models of these families were trained on.

/// Every known template: its name and its text.
pub(super) const TEMPLATES: &[(&str, &str)] =
    &[("alpaca", ALPACA), ("chatml", CHATML), ("exaone", EXAONE), ("llama3", LLAMA3), ("mistral", MISTRAL)];

/// Alpaca: headings before instructions and responses.
const ALPACA: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
                      {{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}\
                      {% elif message['role'] == 'assistant' %}\
                      {{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}\
                      {% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}\
                      {% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}";
/// ChatML: every message between markers, its role first.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
                      '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\
                      {% endif %}";
/// EXAONE: the role in brackets; what the user says has no end marker.
const EXAONE: &str = "{% for message in messages %}{% if message['role'] == 'user' %}\
                      {{ '[|user|]' + message['content'] + '\\n' }}\
                      {% else %}{{ '[|' + message['role'] + '|]' + message['content'] + '[|endofturn|]\\n' }}{% endif %}\
                      {% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}";
/// Llama 3: the role between header markers.
const LLAMA3: &str = "{{ bos_token }}{% for message in messages %}\
                      {{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + \
                      message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";
/// Mistral: instructions between markers, a system message as part of the first one.
const MISTRAL: &str = "{{ bos_token }}{% set before = namespace(text='') %}{% for message in messages %}\
                       {% if message['role'] == 'system' %}{% set before.text = message['content'] + '\\n\\n' %}\
                       {% elif message['role'] == 'user' %}\
                       {{ '[INST] ' + before.text + message['content'] + ' [/INST]' }}{% set before.text = '' %}\
                       {% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}";
