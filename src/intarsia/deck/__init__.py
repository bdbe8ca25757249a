"""The deck: switching and fusing adapters on a live model, with exact undo."""

from intarsia.deck.deck import Deck
from intarsia.deck.status import Kept, Status

__all__ = ["Deck", "Kept", "Status"]
