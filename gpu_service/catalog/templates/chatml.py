"""The catalog's `chatml`: turns between <|im_start|> and <|im_end|>."""

from gpu_service.catalog.templates.entry import TemplateEntry

ENTRY = TemplateEntry(
    id="chatml",
    description="turns between <|im_start|> and <|im_end|>; best for bases whose vocabulary has both",
    file_name="chatml.jinja",
    end_of_turn="<|im_end|>",
)
