"""The deck: switching and fusing adapters on a live model, with exact undo."""

from intarsia.deck.deck import Deck
from intarsia.deck.status import Inserted, Kept, Status

__all__ = ["Deck", "Inserted", "Kept", "Status"]
