"""The deck: switching and fusing adapters on a live model, with exact undo."""

from intarsia.deck.deck import Deck

__all__ = ["Deck"]
