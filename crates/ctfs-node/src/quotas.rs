//! What the admin socket answers about quotas.

use std::{os::unix::ffi::OsStrExt, path::PathBuf};

use ctfs_meta::{MetaError, Namespace, Op, Quota, QuotaUse};
use ctfs_types::{ByteSize, FileName, Ino};
use ctfs_vfs::FsError;

use crate::{
    admin::{LINE_BYTES_MAX, Limit, QuotaReport, QuotasReport, WirePath},
    answers::store,
    node::Node,
    problem::{Code, Problem},
};

impl Node {
    /// Changes the limits that are named and leaves the others as they are.
    pub(crate) async fn set_quota(&self, path: &WirePath, bytes: Option<Limit>, files: Option<Limit>) -> Result<QuotasReport, Problem> {
        let (ino, _) = self.resolve(path.as_path())?;
        let old = self.consensus.replica().read().quota(ino).map_err(store)?;
        let changed = |change: Option<Limit>, old: Option<u64>| match change {
            None => old,
            Some(Limit::None) => None,
            Some(Limit::Most(most)) => Some(most),
        };
        let quota = Quota { bytes: changed(bytes, old.bytes), files: changed(files, old.files) };
        self.put_quota(ino, path, quota).await?;
        self.quotas_at(ino, path)
    }

    pub(crate) async fn clear_quota(&self, path: &WirePath) -> Result<QuotasReport, Problem> {
        let (ino, _) = self.resolve(path.as_path())?;
        self.put_quota(ino, path, Quota::default()).await?;
        self.quotas_at(ino, path)
    }

    async fn put_quota(&self, ino: Ino, path: &WirePath, quota: Quota) -> Result<(), Problem> {
        match self.vfs.propose(Op::SetQuota { ino, quota }).await {
            Ok(_) => Ok(()),
            Err(FsError::Meta(MetaError::NotDirectory(_))) => {
                Err(Problem::new(Code::InvalidArgument, format!("{path} is no directory; a quota limits what is below one")))
            }
            Err(FsError::Meta(verdict)) => Err(Problem::new(Code::InvalidArgument, verdict.to_string())),
            Err(error) => Err(Problem::no_quorum(&error.to_string())),
        }
    }

    fn quotas_at(&self, ino: Ino, path: &WirePath) -> Result<QuotasReport, Problem> {
        let replica = self.consensus.replica();
        let namespace = replica.read();
        let mut over = namespace.quotas_over(ino).map_err(store)?;
        over.retain(|quota| quota.dir == ino);
        Ok(QuotasReport { quotas: over.iter().map(|quota| report(path.clone(), quota)).collect(), more: 0 })
    }

    /// The quotas that have to do with `path`: on it, above it and below it. All without a path.
    pub(crate) fn quotas(&self, path: Option<&WirePath>) -> Result<QuotasReport, Problem> {
        if let Some(path) = path {
            self.resolve(path.as_path())?;
        }
        let replica = self.consensus.replica();
        let namespace = replica.read();
        let mut quotas = Vec::new();
        for quota in namespace.quotas().map_err(store)? {
            let dir = self.path_of(&namespace, quota.dir)?;
            if path.is_none_or(|path| dir.starts_with(path.as_path()) || path.as_path().starts_with(&dir)) {
                quotas.push(report(WirePath(dir), &quota));
            }
        }
        quotas.sort_by(|a, b| a.path.cmp(&b.path));
        let mut room = LINE_BYTES_MAX;
        let fits = quotas.iter().take_while(|quota| {
            // At worst each byte is escaped as six; the rest is names and numbers.
            room = room.saturating_sub(quota.path.0.as_os_str().len() * 6 + 300);
            room > 1000
        });
        let shown = fits.count();
        let more = (quotas.len() - shown) as u64;
        quotas.truncate(shown);
        Ok(QuotasReport { quotas, more })
    }

    /// The quotas that limit what is below an inode, nearest first.
    pub(crate) fn quotas_over(&self, ino: Ino) -> Result<Vec<QuotaReport>, Problem> {
        let replica = self.consensus.replica();
        let namespace = replica.read();
        let over = namespace.quotas_over(ino).map_err(store)?;
        over.iter().map(|quota| Ok(report(WirePath(self.path_of(&namespace, quota.dir)?), quota))).collect()
    }

    fn path_of(&self, namespace: &Namespace, dir: Ino) -> Result<PathBuf, Problem> {
        let mut path = self.settings.mountpoint.clone().unwrap_or_else(|| PathBuf::from("/"));
        let names: Vec<FileName> = namespace.path(dir).map_err(store)?.unwrap_or_default();
        path.extend(names.iter().map(|name| std::ffi::OsStr::from_bytes(name.as_bytes())));
        Ok(path)
    }
}

fn report(path: WirePath, quota: &QuotaUse) -> QuotaReport {
    QuotaReport {
        path,
        bytes_limit: quota.quota.bytes.map(ByteSize),
        bytes_used: ByteSize(quota.totals.allocated),
        files_limit: quota.quota.files,
        files_used: quota.totals.inodes(),
    }
}
