# Sourced by what builds from Debian's packages without installing any.

# private_apt FOLDER RELEASE defines apt(): apt-get of the machine's own Debian mirror, but of that release, with its lists
# and downloads in FOLDER and not knowing of what is installed.
private_apt() {
    local mirror kind
    apt_folder=$1
    mirror=$(apt-get indextargets --format '$(SITE) $(ORIGIN) $(RELEASE)' 'Created-By: Packages' |
        awk '$2 == "Debian" && $3 !~ /security/ { print $1; exit }')
    if [ -z "$mirror" ]; then
        echo "apt knows no Debian mirror: this needs Debian, and apt-get update" >&2
        return 1
    fi
    mkdir -p "$apt_folder"/lists/partial "$apt_folder"/cache/archives/partial
    touch "$apt_folder"/status
    for kind in deb deb-src; do
        echo "$kind [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $2 main"
    done >"$apt_folder"/sources.list
    apt update
}

apt() {
    apt-get -qq -o Dir::Etc::SourceList="$apt_folder"/sources.list -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$apt_folder"/lists -o Dir::State::Status="$apt_folder"/status \
        -o Dir::Cache="$apt_folder"/cache -o APT::Sandbox::User=root "$@"
}

# unpack FOLDER PACKAGE...: downloads the packages into the working folder, and lays what they hold out in FOLDER.
unpack() {
    local folder=$1 package
    shift
    apt download "$@"
    mkdir -p "$folder"
    for package in *.deb; do dpkg-deb -x "$package" "$folder"; done
}
