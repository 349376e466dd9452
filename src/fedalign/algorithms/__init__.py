"""One file per paper: a plan, and maybe a penalty."""
