"""Where records come from: each kind of source is read into a `Table` without decoding a picture."""
