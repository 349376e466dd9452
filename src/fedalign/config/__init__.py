"""Every knob: TOML in, frozen and checked sections out."""
