// SPDX-License-Identifier: GPL-2.0
/* Functions of shmem that the kernel does not export to modules. See helpers.h. */
#include <linux/fcntl.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/mm.h>
#include <linux/mount.h>
#include <linux/shmem_fs.h>

#include "helpers.h"

/* Both are written once, when the module is loaded, before anybody else can read them. */
static struct vfsmount *huge_mount;
static const struct vm_operations_struct *shmem_ops;

/* Mounts a tmpfs that allocates folios of 2 MiB, as drm_gem_huge_mnt_create() does. */
static struct vfsmount *mount_huge(void)
{
	struct file_system_type *type = get_fs_type("tmpfs");
	struct vfsmount *mount;
	struct fs_context *fc;
	int err;

	if (!type)
		return ERR_PTR(-ENODEV);
	fc = fs_context_for_mount(type, SB_KERNMOUNT);
	if (IS_ERR(fc))
		return ERR_CAST(fc);
	err = vfs_parse_fs_string(fc, "source", "kvm-demand-paging");
	if (!err)
		err = vfs_parse_fs_string(fc, "huge", "always");
	mount = err ? ERR_PTR(err) : fc_mount_longterm(fc);
	put_fs_context(fc);
	return mount;
}

/* Gets the VMA operations of shmem from a shmem file: the kernel does not export them. */
static const struct vm_operations_struct *find_shmem_ops(void)
{
	struct file *file = shmem_file_setup("kvm-demand-paging", PAGE_SIZE,
					     mk_vma_flags(VMA_NORESERVE_BIT));
	struct vm_area_desc desc = {
		.mm = current->mm,
		.end = PAGE_SIZE,
		.vma_flags = mk_vma_flags(VMA_SHARED_BIT),
	};

	if (IS_ERR(file))
		return ERR_CAST(file);
	desc.file = file;
	desc.vm_file = file;
	if (!file->f_op->mmap_prepare || file->f_op->mmap_prepare(&desc))
		desc.vm_ops = NULL;
	fput(file);
	return desc.vm_ops;
}

/* A kernel without transparent huge pages refuses huge=always: then there is no mount. */
int kdp_shmem_init(void)
{
	struct vfsmount *mount;

	shmem_ops = find_shmem_ops();
	if (IS_ERR(shmem_ops))
		return PTR_ERR(shmem_ops);
	mount = mount_huge();
	if (!IS_ERR(mount))
		huge_mount = mount;
	else if (PTR_ERR(mount) != -EINVAL)
		return PTR_ERR(mount);
	return 0;
}

/* A file that is still open keeps the mount alive. */
void kdp_shmem_exit(void)
{
	if (huge_mount)
		kern_unmount(huge_mount);
}

bool kdp_shmem_has_huge(void)
{
	return huge_mount;
}

/*
 * Creates a shmem file of @size bytes, like a memfd (memfd_alloc_file() in mm/memfd.c). The file
 * cannot shrink. The kernel allocates it in folios of 2 MiB where it can. -EOPNOTSUPP if the kernel
 * has no such folios.
 */
struct file *kdp_shmem_huge_file(loff_t size)
{
	struct inode *inode;
	struct file *file;

	if (!huge_mount)
		return ERR_PTR(-EOPNOTSUPP);
	file = shmem_file_setup_with_mnt(huge_mount, "kvm-demand-paging", size,
					 mk_vma_flags(VMA_NORESERVE_BIT));
	if (IS_ERR(file))
		return file;
	file->f_mode |= FMODE_LSEEK | FMODE_PREAD | FMODE_PWRITE;
	file->f_flags |= O_LARGEFILE;
	inode = file_inode(file);
	inode->i_mode &= ~0111;
	SHMEM_I(inode)->seals = F_SEAL_SHRINK | F_SEAL_EXEC;
	return file;
}

/*
 * mbind(2) and get_mempolicy(2). In shmem, the memory policy belongs to the inode, and applies to
 * all its mappings. A VMA of native memory has the inode of the memfd and the offset in it, as
 * shmem's functions expect.
 */
#ifdef CONFIG_NUMA
int kdp_shmem_set_policy(struct vm_area_struct *vma, struct mempolicy *policy)
{
	if (!shmem_ops || !shmem_ops->set_policy)
		return -EOPNOTSUPP;
	return shmem_ops->set_policy(vma, policy);
}

struct mempolicy *kdp_shmem_get_policy(struct vm_area_struct *vma, unsigned long addr,
				       pgoff_t *interleave)
{
	if (!shmem_ops || !shmem_ops->get_policy)
		return vma->vm_policy;
	return shmem_ops->get_policy(vma, addr, interleave);
}
#endif
