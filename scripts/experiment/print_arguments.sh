#!/bin/sh
# Prints its arguments, one a line: in the place of Python it shows what a training script would start.
printf '%s\n' "$@"
