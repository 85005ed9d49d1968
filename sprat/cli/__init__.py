"""The one command, ``sprat``: thin verbs, no logic. Nothing here imports torch until a verb needs it."""
