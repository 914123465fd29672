"""From tokens to the text of an output. Gateways show it; nodes look for stop strings in it, to end a request there."""

from services.text.output_text import OutputText

__all__ = ["OutputText"]
