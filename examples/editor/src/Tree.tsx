import { useVirtualizer } from '@tanstack/react-virtual'
import { type DragEvent, type KeyboardEvent, useMemo, useRef, useState } from 'react'
import { useShallow } from 'zustand/react/shallow'

import { addFiles, createFile, openFile, removeFile, renameFile, useProjectEditorStore as useStore } from './store.ts'

type Node = { path: string; name: string; depth: number; directory: boolean }

/** The rows of the tree: directories first, each followed by its own unless it is closed. */
function rows(paths: string[], closed: Set<string>): Node[] {
  type Directory = { directories: Map<string, Directory>; files: string[] }
  const top: Directory = { directories: new Map(), files: [] }
  for (const path of paths) {
    let at = top
    const parts = path.split('/')
    for (const part of parts.slice(0, -1)) {
      if (!at.directories.has(part)) at.directories.set(part, { directories: new Map(), files: [] })
      at = at.directories.get(part)!
    }
    at.files.push(parts.at(-1)!)
  }
  const found: Node[] = []
  const walk = (at: Directory, prefix: string, depth: number) => {
    for (const [name, inside] of [...at.directories].sort(([a], [b]) => a.localeCompare(b))) {
      found.push({ path: prefix + name, name, depth, directory: true })
      if (!closed.has(prefix + name)) walk(inside, `${prefix}${name}/`, depth + 1)
    }
    for (const name of at.files.sort((a, b) => a.localeCompare(b))) found.push({ path: prefix + name, name, depth, directory: false })
  }
  walk(top, '', 1)
  return found
}

export function Tree() {
  const { files, active, errors } = useStore(useShallow((state) => ({ files: state.files, active: state.active, errors: state.errors })))
  const [closed, setClosed] = useState(new Set<string>())
  const [selected, setSelected] = useState<string | null>(null)
  const scroller = useRef<HTMLDivElement>(null)
  const nodes = useMemo(() => rows([...files.keys()], closed), [files, closed])
  const broken = useMemo(() => new Set(errors.map((error) => error.file)), [errors])
  const list = useVirtualizer({ count: nodes.length, getScrollElement: () => scroller.current, estimateSize: () => 24, overscan: 20 })
  const current = selected ?? active
  const at = nodes.findIndex((node) => node.path === current)

  const directoryOf = (path: string | null) => {
    const node = nodes.find((each) => each.path === path)
    if (!node) return ''
    return node.directory ? node.path : node.path.split('/').slice(0, -1).join('/')
  }
  const toggle = (path: string, close = !closed.has(path)) => {
    const next = new Set(closed)
    if (close) next.add(path)
    else next.delete(path)
    setClosed(next)
  }
  const choose = (node: Node) => {
    setSelected(node.path)
    if (node.directory) toggle(node.path)
    else void openFile(node.path)
  }
  const move = (to: number) => {
    const node = nodes[Math.min(Math.max(to, 0), nodes.length - 1)]
    if (!node) return
    setSelected(node.path)
    list.scrollToIndex(nodes.indexOf(node))
  }
  const onKey = (event: KeyboardEvent) => {
    const node = nodes[at]
    const keys: Record<string, () => void> = {
      ArrowDown: () => move(at + 1),
      ArrowUp: () => move(at - 1),
      Home: () => move(0),
      End: () => move(nodes.length - 1),
      ArrowRight: () => node?.directory && toggle(node.path, false),
      ArrowLeft: () => (node?.directory && !closed.has(node.path) ? toggle(node.path, true) : setSelected(directoryOf(node?.path ?? null) || null)),
      Enter: () => node && choose(node),
      F2: () => node && !node.directory && rename(node.path),
      Delete: () => node && !node.directory && void removeFile(node.path),
    }
    const act = event.ctrlKey || event.metaKey || event.altKey ? undefined : keys[event.key]
    if (!act) return
    event.preventDefault()
    act()
  }
  const create = () => {
    const directory = directoryOf(current)
    const path = prompt('Path of the new file', directory ? `${directory}/` : '')
    if (path) void createFile(path)
  }
  const rename = (from: string) => {
    const to = prompt('New path', from)
    if (to) void renameFile(from, to)
  }
  const onDrop = (event: DragEvent) => {
    event.preventDefault()
    void addFiles(directoryOf(current), [...event.dataTransfer.files])
  }
  const file = current !== null && files.has(current) ? current : null

  return (
    <>
      <div className="bar">
        <button onClick={create}>New</button>
        <button disabled={!file} onClick={() => file && rename(file)}>Rename</button>
        <button disabled={!file} onClick={() => file && removeFile(file)}>Delete</button>
      </div>
      <div
        ref={scroller} className="tree" role="tree" tabIndex={0} aria-label="Files of the project"
        aria-activedescendant={at >= 0 ? `node-${at}` : undefined}
        onKeyDown={onKey} onDragOver={(event) => event.preventDefault()} onDrop={onDrop}
      >
        <div role="none" style={{ height: list.getTotalSize(), position: 'relative' }}>
          {list.getVirtualItems().map(({ index, start, size }) => {
            const node = nodes[index]!
            const marks = [node.path === current && 'chosen', broken.has(node.path) && 'broken'].filter(Boolean).join(' ')
            return (
              <div
                key={node.path} id={`node-${index}`} role="treeitem" aria-level={node.depth} aria-selected={node.path === current}
                aria-expanded={node.directory ? !closed.has(node.path) : undefined} className={marks}
                style={{ position: 'absolute', top: 0, left: 0, right: 0, height: size, transform: `translateY(${start}px)`, paddingLeft: node.depth * 14 - 4 }}
                onClick={() => choose(node)}
              >
                <span aria-hidden="true">{node.directory ? (closed.has(node.path) ? '▸ ' : '▾ ') : '\u2007 '}</span>
                {node.name}
              </div>
            )
          })}
        </div>
      </div>
      <p className="hint">Drop files here to add them.</p>
    </>
  )
}
