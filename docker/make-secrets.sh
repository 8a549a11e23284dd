#!/bin/sh
# Writes docker/secrets/: new random credentials for the compose stack. Existing files are kept.
# Compose mounts secret files with their host permissions, so they are readable inside the closed folder.
set -eu
folder="${1:-$(dirname "$0")/secrets}"
umask 022
mkdir -p "$folder"
chmod 700 "$folder"

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

if [ ! -e "$folder/redis_password" ] || [ ! -e "$folder/redis_users.acl" ]; then
  password=$(random)
  digest=$(printf %s "$password" | sha256sum | cut -d' ' -f1)
  # Only the commands that the logit store uses, on its own keys; the default user is off.
  {
    echo "user default off resetpass resetkeys resetchannels -@all"
    echo "user health on nopass resetkeys resetchannels -@all +ping"
    printf 'user exfm on #%s ~exfm:* resetchannels -@all' "$digest"
    echo " +evalsha +script|load +get +set +pexpire +mget +time +info +ping +hello +client|setinfo +client|setname"
  } > "$folder/redis_users.acl"
  printf %s "$password" > "$folder/redis_password"
fi
[ -e "$folder/serve_token" ] || random > "$folder/serve_token"
[ -e "$folder/grafana_password" ] || random > "$folder/grafana_password"
echo "secrets are in $folder"
