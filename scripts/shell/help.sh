# shellcheck shell=bash
# Sourced with a script's first argument: for --help it shows the comment block at the script's top, for --version the
# version, and ends the script.
case ${1:-} in
    -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    --version)
        sed -n 's/^version = "\(.*\)"/tive \1/p' "$(dirname "${BASH_SOURCE[0]}")/../../pyproject.toml"
        exit
        ;;
esac

fail() {
    echo "error: $*" >&2
    exit 2
}
