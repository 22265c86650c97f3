//! The folders above the pods' cgroup, in which it may be created anew.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use super::{Watch, WatchTarget, folder_flags, inode};

// === impl Watch ===

impl Watch {
    /// Whether an event shows that the pods' cgroup was recreated.
    pub(in crate::sandboxes) fn is_root_watched(&self) -> bool {
        self.sees_root
    }

    /// Whether the pods' cgroup is not the watched one.
    pub(in crate::sandboxes) fn is_moved(&self) -> bool {
        inode(&self.root) != self.folders.get(&self.root).map(|folder| folder.inode)
    }

    /// Watches the folders above the pods' cgroup, which may be others than before.
    pub(super) fn watch_above(&mut self) {
        let before = std::mem::take(&mut self.above);
        let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev());
        let root = self.root.clone();
        // That of the mount, even while the pods' cgroup is gone.
        let mount = root.ancestors().find_map(device);
        let refused = self.watches.refused();
        for (below, above) in root.ancestors().zip(root.ancestors().skip(1)) {
            match device(above) {
                None => continue,
                other if other != mount => break,
                Some(_) => {}
            }
            let name = below.file_name().unwrap_or_default();
            let watch = self.watches.add(above, folder_flags(), WatchTarget::Above(name.into()));
            self.above.extend(watch);
        }
        self.sees_root = !self.above.is_empty() && self.watches.refused() == refused;
        for gone in before.into_iter().filter(|before| !self.above.contains(before)) {
            self.watches.end(gone);
        }
    }
}
