/** A file that somebody else has open, too: everybody's keys meet in its room, which saves them. Loaded when it is needed. */
import { diff } from '@codemirror/merge'
import { type Compartment, Prec } from '@codemirror/state'
import { keymap } from '@codemirror/view'
import type { EditorView } from 'codemirror'
import * as decoding from 'lib0/decoding'
import * as encoding from 'lib0/encoding'
import { yCollab, yUndoManagerKeymap } from 'y-codemirror.next'
import { Awareness, applyAwarenessUpdate, encodeAwarenessUpdate } from 'y-protocols/awareness'
import * as sync from 'y-protocols/sync'
import * as Y from 'yjs'

import { inRoom, knownDoc, leftRoom, project, save, say } from './store.ts'

const SYNC = 0
const AWARENESS = 1
const ALONE = new Map([
  [4400, 'the room did not understand this page'],
  [4403, 'you may not write to this project any more'],
  [4404, 'it is not there any more'],
  [4413, 'it cannot be shared'],
  [4500, 'its room failed'],
])
const MOST_TRIES = 8 // some 30 s, longer than an orchestrator's restart
const COLORS = ['#0a7ea4', '#a4420a', '#5b0aa4', '#0a7a3f', '#a40a5b', '#6b6b00']

type Words = { type: string; generation: number; root: string; version: number; loaded: number; snapshot: string }

/** The text of one of the file's rooms. Nothing that was deleted is forgotten, so that `saved` can be read again. */
class Copy {
  readonly doc = new Y.Doc({ gc: false })
  readonly text: Y.Text
  readonly awareness = new Awareness(this.doc)
  synced = false
  constructor(
    readonly generation: number,
    private readonly root: string,
    public version: number,
    readonly loaded: number,
    public saved: Y.Snapshot,
  ) {
    this.text = this.doc.getText(root)
  }
  /** What is saved as `version`, however much was typed since. */
  base(): string {
    return Y.createDocFromSnapshot(this.doc, this.saved).getText(this.root).toString()
  }
  /** `base`, with what was typed here and is not known to be saved: what others typed, they have. Null: it cannot be told apart. */
  own(): string | null {
    const { ds, sv } = Y.snapshot(this.doc)
    const mine = new Map(this.saved.sv).set(this.doc.clientID, sv.get(this.doc.clientID) ?? 0)
    const doc = Y.createDocFromSnapshot(this.doc, Y.createSnapshot(ds, mine))
    return doc.store.pendingStructs ? null : doc.getText(this.root).toString()
  }
  get clean(): boolean {
    return Y.equalSnapshots(Y.snapshot(this.doc), this.saved)
  }
}

/** Of files whose tab is not shown: their rooms go on without us, and have what was typed here. */
const kept = new Map<string, Copy>()

export class Room {
  private socket: WebSocket | null = null
  private copy: Copy | null = null // in the editor
  private next: Copy | null = null // not there yet
  private tries = 0
  private left = false
  private timer: ReturnType<typeof setTimeout> | undefined

  constructor(
    private readonly path: string,
    private readonly editor: EditorView,
    private readonly place: Compartment,
  ) {
    const copy = kept.get(path)
    kept.delete(path)
    // A later version has what the room had then; before it, what was typed since belongs to the same text.
    if (copy && copy.version === knownDoc(path)?.version) {
      edit(copy.text, copy.text.toString(), editor.state.doc.toString())
      this.bind(this.attached(copy))
    }
    void this.connect()
  }

  private async connect(): Promise<void> {
    let url: string | null
    try {
      url = await project.room(this.path)
    } catch {
      return this.again()
    }
    if (this.left) return
    if (url === null) return this.leave()
    const socket = (this.socket = new WebSocket(url))
    socket.binaryType = 'arraybuffer'
    socket.onmessage = ({ data }) => {
      if (this.socket !== socket) return
      if (typeof data === 'string') this.told(JSON.parse(data))
      else this.heard(new Uint8Array(data))
    }
    socket.onclose = ({ code }) => {
      if (this.left || this.socket !== socket) return
      this.socket = null
      this.next = null
      const why = ALONE.get(code)
      if (why === undefined) return this.again()
      say(`${this.path} is edited by you alone from here on: ${why}.`)
      this.leave()
    }
  }

  private again(): void {
    if (this.left) return
    if (++this.tries > MOST_TRIES) {
      if (this.copy) say(`${this.path} is edited by you alone from here on: its room does not answer.`)
      return this.leave()
    }
    this.timer = setTimeout(() => void this.connect(), Math.min(300 * 2 ** this.tries, 5000) * (0.5 + Math.random() / 2))
  }

  // --- what the room says

  private told(words: Words): void {
    if (words.type === 'welcome') {
      const saved = snapshotOf(words.snapshot)
      if (this.copy?.generation === words.generation) this.copy.saved = saved
      else this.next = this.watched(new Copy(words.generation, words.root, words.version, words.loaded, saved))
      this.send(SYNC, (to) => sync.writeSyncStep1(to, (this.next ?? this.copy)!.doc))
    } else if (words.type === 'saved') {
      const copy = this.next ?? this.copy
      if (!copy) return
      copy.version = words.version
      copy.saved = snapshotOf(words.snapshot)
      if (copy === this.copy) inRoom(this.path, copy.version, copy.clean)
    } else if (words.type === 'unsaved') {
      say(`${this.path} is not saved yet: the database does not answer. What was typed is kept.`, 'error')
    }
  }

  private heard(message: Uint8Array): void {
    const copy = this.next ?? this.copy
    if (!copy) return
    const from = decoding.createDecoder(message)
    const kind = decoding.readVarUint(from)
    if (kind === AWARENESS) return applyAwarenessUpdate(copy.awareness, decoding.readVarUint8Array(from), 'room')
    const to = encoding.createEncoder()
    encoding.writeVarUint(to, SYNC)
    const step = sync.readSyncMessage(from, to, copy.doc, 'room')
    if (encoding.length(to) > 1) this.socket?.send(encoding.toUint8Array(to))
    if (step === sync.messageYjsSyncStep2) this.synced(copy)
  }

  private synced(copy: Copy): void {
    this.tries = 0
    copy.synced = true
    if (copy === this.next) void this.take(copy)
    else this.here(copy)
  }

  private here(copy: Copy): void {
    this.announce(copy, [copy.doc.clientID])
    inRoom(this.path, copy.version, copy.clean)
  }

  /** Go on with another room's text, and with what was typed here and is in no room yet. */
  private async take(copy: Copy): Promise<void> {
    // Of what a room saved and could not tell any more, nobody knows which keys were in it.
    const unclear = this.copy && (await project.savedByRoom(this.path, this.copy.version, copy.loaded).catch(() => null))
    if (this.left || this.next !== copy) return
    if (unclear === null && this.copy) return this.socket?.close()
    const base = this.copy ? this.copy.base() : (knownDoc(this.path)?.base ?? '')
    const mine = this.copy ? this.copy.own() : this.editor.state.doc.toString()
    if (this.copy && (mine === null || (unclear && mine !== base))) {
      this.leave()
      return void save(this.path) // merged by lines, or shown to a person
    }
    if (mine !== null && mine !== base) {
      const theirs = copy.text.toString()
      edit(copy.text, theirs, together(base, mine, theirs))
    }
    this.next = null
    this.bind(copy)
    this.here(copy)
  }

  /** Show a room's text in the editor. */
  private bind(copy: Copy): void {
    this.editor.dispatch({ effects: this.place.reconfigure([]) }) // before the former text is let go
    this.copy?.doc.destroy()
    this.copy?.awareness.destroy()
    this.copy = copy
    const [now, text] = [this.editor.state.doc.toString(), copy.text.toString()]
    const undo = new Y.UndoManager(copy.text)
    this.editor.dispatch({
      changes: diff(now, text).map(({ fromA, toA, fromB, toB }) => ({ from: fromA, to: toA, insert: text.slice(fromB, toB) })),
      effects: this.place.reconfigure([yCollab(copy.text, copy.awareness, { undoManager: undo }), Prec.highest(keymap.of(yUndoManagerKeymap))]),
    })
  }

  // --- what is typed here

  private watched(copy: Copy): Copy {
    copy.awareness.setLocalStateField('user', look(copy.doc.clientID))
    return this.attached(copy)
  }

  private attached(copy: Copy): Copy {
    copy.doc.on('update', (update: Uint8Array, origin: unknown) => {
      // What is typed while nobody answers is sent by the next meeting.
      if (origin !== 'room' && copy.synced) this.send(SYNC, (to) => sync.writeUpdate(to, update))
    })
    copy.awareness.on('update', ({ added, updated }: { added: number[]; updated: number[] }) => {
      if ([...added, ...updated].includes(copy.doc.clientID)) this.announce(copy, [copy.doc.clientID])
    })
    return copy
  }

  private announce(copy: Copy, clients: number[]): void {
    if (copy.synced) this.send(AWARENESS, (to) => encoding.writeVarUint8Array(to, encodeAwarenessUpdate(copy.awareness, clients)))
  }

  private send(kind: number, write: (to: encoding.Encoder) => void): void {
    if (this.socket?.readyState !== WebSocket.OPEN) return
    const to = encoding.createEncoder()
    encoding.writeVarUint(to, kind)
    write(to)
    this.socket.send(encoding.toUint8Array(to))
  }

  // --- the end

  /** Go on alone, with what stands in the editor; `again`: until the file is shown again. */
  leave(again = false): void {
    if (this.left) return
    this.left = true
    clearTimeout(this.timer)
    this.socket?.close()
    this.editor.dispatch({ effects: this.place.reconfigure([]) })
    const copy = this.copy
    leftRoom(this.path, copy && { base: copy.base(), version: copy.version })
    if (copy && again && knownDoc(this.path)) {
      copy.synced = false
      kept.set(this.path, copy)
    } else {
      copy?.awareness.destroy()
      copy?.doc.destroy()
    }
  }
}

function snapshotOf(text: string): Y.Snapshot {
  return Y.decodeSnapshot(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)))
}

function look(id: number): { name: string; color: string; colorLight: string } {
  const color = COLORS[id % COLORS.length]!
  return { name: project.config.email.split('@')[0]!, color, colorLight: `${color}33` }
}

/** Make `before` in `text` into `after`, where they differ. */
function edit(text: Y.Text, before: string, after: string): void {
  text.doc!.transact(() => {
    for (const { fromA, toA, fromB, toB } of diff(before, after).toReversed()) {
      if (toA > fromA) text.delete(fromA, toA - fromA)
      if (toB > fromB) text.insert(fromA, after.slice(fromB, toB))
    }
  })
}

/** Two edits of one text, both kept, as if both had been typed in one room. */
export function together(base: string, mine: string, theirs: string): string {
  const [one, other] = [new Y.Doc(), new Y.Doc()]
  const text = one.getText('')
  text.insert(0, base)
  Y.applyUpdate(other, Y.encodeStateAsUpdate(one))
  edit(text, base, mine)
  edit(other.getText(''), base, theirs)
  Y.applyUpdate(one, Y.encodeStateAsUpdate(other))
  return text.toString()
}
