"""The catalog's `plain-turns`: named turns in plain words, closed by the tokenizer's own end of sequence."""

from gpu_service.catalog.templates.entry import TemplateEntry

ENTRY = TemplateEntry(
    id="plain-turns",
    description="`User:` and `Assistant:` in plain words, the end-of-sequence token after each answer; for any base",
    file_name="plain_turns.jinja",
    end_of_turn="",
)
