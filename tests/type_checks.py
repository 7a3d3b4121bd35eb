"""How types are checked in the tests: as type checkers for whole programs do it, an int serves as a float as well."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
