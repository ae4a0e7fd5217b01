# Blockyard: lets the spawner's children make user namespaces, and confines nothing.
#
# A profile of the host may forbid bwrap to make a user namespace, and without one there is no sandbox. This profile has
# no path, so no program gets it by being run: only blockyard-spawner.service names it (AppArmorProfile=), and bwrap
# and what runs in it inherit it. What a worker may do is decided elsewhere: its uid, its namespaces, its system call
# filter and its cgroup. `by admin install-apparmor` writes this file anew; own rules belong into local/blockyard.

abi <abi/4.0>,

# attach_disconnected: the bundle, the log's pipe and the files that are made for a worker come as descriptors from
# outside its mount namespace, and have no path there. mediate_deleted: those made files have no name at all.
profile blockyard flags=(attach_disconnected, mediate_deleted) {
  userns,

  allow all,
  # ix: what is run stays in this profile. Without it the host's own profile for /usr/bin/bwrap would take over.
  /{**,} ix,

  include if exists <local/blockyard>
}
