#!/usr/bin/env bash
# Sets the coordinator's machine up: coordinator.sh HOST (its DNS name). Run it as root in a clone, once /opt/panfm holds
# the packages. Given again it replaces units and settings, and no key. It makes, in this order:
#   account panfm-coordinator           runs Flower and every `python -m server`; its $FLWR_HOME is
#                                       /var/lib/panfm-coordinator/flwr
#   /opt/panfm-source                   a clone of the committed files, which runs and kits are made from
#   /etc/panfm                          certificates and secrets (credentials.sh), readable to that account alone
#   systemd units, nginx's door, and /usr/local/bin/panfm-server: `python -m server` as that account
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "coordinator.sh: expected root" >&2; exit 1; }
host="$1" home=/var/lib/panfm-coordinator
here="$(cd "$(dirname "$0")" && pwd)"
[ -x /opt/panfm/bin/flower-superlink ] || { echo "coordinator.sh: /opt/panfm/bin/flower-superlink: not there, expected panfm[server] in /opt/panfm" >&2; exit 1; }
[ -d /etc/nginx/conf.d ] || { echo "coordinator.sh: /etc/nginx/conf.d: not there, expected nginx" >&2; exit 1; }

id -u panfm-coordinator >/dev/null 2>&1 || useradd --system --user-group --home-dir "$home" --shell /usr/sbin/nologin panfm-coordinator
install -d -m 0700 -o panfm-coordinator -g panfm-coordinator "$home" "$home/flwr" "$home/kits" /srv/panfm/runs
clone="$(git -c safe.directory='*' -C "$here" rev-parse --show-toplevel)"
rm -rf /opt/panfm-source.new
git -c safe.directory='*' clone --quiet --no-hardlinks "$clone" /opt/panfm-source.new
rm -rf /opt/panfm-source && mv /opt/panfm-source.new /opt/panfm-source
chmod -R go=rX /opt/panfm-source

[ -e /etc/panfm/ca.crt ] || "$here/credentials.sh" coordinator /etc/panfm "$host"
chown -R panfm-coordinator: /etc/panfm
if [ -e /etc/panfm/ca.key ]; then chown root: /etc/panfm/ca.key; fi
install -m 0600 -o panfm-coordinator -g panfm-coordinator /dev/stdin "$home/flwr/config.toml" <<CONFIG
[superlink]
default = "deployment"

[superlink.deployment]
address = "127.0.0.1:8000"
root-certificates = "/etc/panfm/ca.crt"
CONFIG
install -m 0755 /dev/stdin /usr/local/bin/panfm-server <<SCRIPT
#!/bin/sh
cd $home/kits && umask 077 && exec runuser -u panfm-coordinator -- env HOME=$home FLWR_HOME=$home/flwr PYTHONPATH=/opt/panfm-source /opt/panfm/bin/python -m server "\$@"
SCRIPT

sed "s/coordinator\.example\.org/$host/g" "$here/hosts/nginx.conf" >/etc/nginx/conf.d/panfm.conf
units=(panfm-superlink.service panfm-superexec.service)
for unit in "${units[@]}" panfm-run@.service; do install -m 0644 "$here/hosts/$unit" /etc/systemd/system/; done
install -d /etc/nftables.d
install -m 0644 "$here/hosts/panfm-isolation-coordinator.nft" /etc/nftables.d/
install -m 0644 "$here/hosts/panfm-isolation@.service" /etc/systemd/system/
systemctl daemon-reload
systemctl enable --now panfm-isolation@coordinator.service "${units[@]}" nginx.service
systemctl restart nginx.service
echo "coordinator.sh: $host is set up; move /etc/panfm/ca.key to where no server can read it"
