"""How models write tool calls, where their server does not do it for them."""
