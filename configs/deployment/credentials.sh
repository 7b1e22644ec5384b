#!/usr/bin/env bash
# Who trusts whom: the coordinator's certificate, and one key per site. Nothing here leaves the machine that makes it
# except ca.crt (to every site) and <name>.pub (from a site to the coordinator).
#
#   credentials.sh coordinator FOLDER HOST   ca.crt, server.pem, server.key for HOST (DNS name or IP address), and the
#                                            secret that the coordinator's SuperExec shows to its SuperLink
#   credentials.sh site FOLDER NAME          NAME (private key of the site's SuperNode) and NAME.pub
#
# It replaces nothing. If it ends half-way, give it again: files are made in FOLDER/.making, which then becomes
# FOLDER/.made, and are moved from there one by one, ca.crt or the site's private key last.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
role="$1" folder="$2" name="$3"
case "$role" in
coordinator) files=(ca.key server.key server.pem superexec.secret ca.crt) ;;
site) files=("$name.pub" "$name") ;;
*) echo "credentials.sh: $role: expected coordinator or site" >&2; exit 2 ;;
esac
[[ "$name" =~ ^[A-Za-z0-9][A-Za-z0-9._:-]*$ ]] || { echo "credentials.sh: $name: expected a name without / and spaces" >&2; exit 2; }
umask 077
mkdir -p "$folder"
cd "$folder"
exec 9<.
flock 9
made=".$role-$name.made" making=".$role-$name.making"

if [ ! -d "$made" ]; then
  for file in "${files[@]}"; do
    [ ! -e "$file" ] || { echo "credentials.sh: $folder/$file is there already, expected none of ${files[*]}" >&2; exit 1; }
  done
  rm -rf "$making"
  mkdir "$making"
  cd "$making"
  ec=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
  if [ "$role" = site ]; then
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "$name" -f "$name"
  else
    if [[ "$name" =~ ^[0-9.]+$|: ]]; then kind=IP; else kind=DNS; fi
    openssl req -x509 "${ec[@]}" -days 365 -subj "/CN=panfm CA" -addext basicConstraints=critical,CA:TRUE \
      -addext keyUsage=critical,keyCertSign,cRLSign -keyout ca.key -out ca.crt 2>/dev/null
    openssl req "${ec[@]}" -subj "/CN=$name" -keyout server.key -out server.csr 2>/dev/null
    printf 'subjectAltName=%s:%s,IP:127.0.0.1\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n' "$kind" "$name" >san.cnf
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile san.cnf -out server.pem 2>/dev/null
    openssl rand -out superexec.secret 32
  fi
  sync "${files[@]}" .
  cd ..
  mv -T "$making" "$made"
fi
for file in "${files[@]}"; do
  [ ! -e "$made/$file" ] || mv -n "$made/$file" "$file"
done
rm -rf "$made"
