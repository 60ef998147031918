"""How the bytes of a data file become rows; `llama2.files` is the way in."""
