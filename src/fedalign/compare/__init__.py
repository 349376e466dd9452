"""`fedalign compare`: algorithms over seeds. What a wrong word is told by loads no library."""
