"""The scoreboard: the same hard uses of flowpost and of the public libraries. Importing it imports none of them."""
