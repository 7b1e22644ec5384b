#!/usr/bin/env bash
# Sets the coordinator's machine up: coordinator.sh HOST (its DNS name). Run it as root in a clone, once /opt/panfm holds
# the packages. Given again it replaces source, units and settings, no key, and starts the servers anew; while a run is
# under way it changes nothing. It makes, in this order:
#   account panfm-coordinator           runs Flower and every `python -m server`; its $FLWR_HOME is
#                                       /var/lib/panfm-coordinator/flwr
#   /opt/panfm-source                   a link to a clone of the committed files, which runs and kits are made from
#   /etc/panfm                          certificates and secrets (credentials.sh), readable to that account alone
#   systemd units, nginx's door, and /usr/local/bin/panfm-server: `python -m server` as that account
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "coordinator.sh: expected root" >&2; exit 1; }
host="$1" home=/var/lib/panfm-coordinator
here="$(cd "$(dirname "$0")" && pwd)"
[ -x /opt/panfm/bin/flower-superlink ] || { echo "coordinator.sh: /opt/panfm/bin/flower-superlink: not there, expected panfm[server] in /opt/panfm" >&2; exit 1; }
[ -d /etc/nginx/conf.d ] || { echo "coordinator.sh: /etc/nginx/conf.d: not there, expected nginx" >&2; exit 1; }

for program in git nginx openssl pgrep systemctl; do
  command -v $program >/dev/null || { echo "coordinator.sh: $program: not found" >&2; exit 1; }
done
if [ -e /etc/panfm/server.pem ] && ! openssl x509 -in /etc/panfm/server.pem -noout -checkhost "$host" | grep -q "does match"; then
  echo "coordinator.sh: /etc/panfm/server.pem: not for $host; docs/kit.md tells how certificates are renewed" >&2
  exit 1
fi
under_way="$(systemctl list-units --plain --no-legend --state=active,activating 'panfm-run@*.service' | cut -d' ' -f1)"
if id -u panfm-coordinator >/dev/null 2>&1; then
  # By number only: Flower's command lines hold tokens.
  under_way+=" $(pgrep -u panfm-coordinator -f 'flwr-serverapp|-m server (keep|start|resume)' | sed 's/^/process /' || true)"
fi
if [ -n "${under_way// /}" ]; then
  echo "coordinator.sh: a run is under way, nothing was changed; expected none (panfm-server stop RUN):" $under_way >&2
  exit 1
fi

id -u panfm-coordinator >/dev/null 2>&1 || useradd --system --user-group --home-dir "$home" --shell /usr/sbin/nologin panfm-coordinator
install -d -m 0700 -o panfm-coordinator -g panfm-coordinator "$home" "$home/flwr" "$home/kits" /srv/panfm/runs
clone="$(git -c safe.directory='*' -C "$here" rev-parse --show-toplevel)"
source="/opt/panfm-source-$(git -c safe.directory='*' -C "$clone" rev-parse --short=12 HEAD)"
if [ ! -d "$source" ]; then
  rm -rf "$source.new"
  git -c safe.directory='*' clone --quiet --no-hardlinks "$clone" "$source.new"
  chmod -R go=rX "$source.new"
  mv -T "$source.new" "$source"
fi
[ -L /opt/panfm-source ] || rm -rf /opt/panfm-source
ln -sfn "$source" /opt/panfm-source.new
mv -T /opt/panfm-source.new /opt/panfm-source
deployment="$source/configs/deployment" hosts="$source/configs/deployment/hosts"

[ -e /etc/panfm/ca.crt ] || "$deployment/credentials.sh" coordinator /etc/panfm "$host"
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

sed "s/coordinator\.example\.org/$host/g" "$hosts/nginx.conf" >/etc/nginx/conf.d/panfm.conf
units=(panfm-superlink.service panfm-superexec.service)
for unit in "${units[@]}" panfm-run@.service; do install -m 0644 "$hosts/$unit" /etc/systemd/system/; done
install -d /etc/nftables.d
install -m 0644 "$hosts/panfm-isolation-coordinator.nft" /etc/nftables.d/
install -m 0644 "$hosts/panfm-isolation@.service" /etc/systemd/system/
systemctl daemon-reload
nginx -t -q
systemctl enable panfm-isolation@coordinator.service "${units[@]}" nginx.service
systemctl restart panfm-isolation@coordinator.service "${units[@]}" nginx.service
echo "coordinator.sh: $host is set up; move /etc/panfm/ca.key to where no server can read it"
